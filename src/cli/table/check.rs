//! `taod table check`: whether the tables are what their readers rely on.

use clap::Args;

use super::{Exit, Global};
use crate::cli::lines::Output;
use crate::cli::{Usage, block_on};
use crate::query_log::{TopicPartition, kafka};
use crate::table::{Name, check};

/// Check that files exist and are whole, statistics are true, the log has no gap, positions only grow, and no row is
/// doubled or past its position. Changes nothing. Exit code 1 when something is wrong; each finding says the repair.
#[derive(Debug, Args)]
pub struct Check {
    /// Only this table, such as `queries`.
    #[arg(long, value_name = "NAME")]
    table: Option<String>,
    /// Print one JSON document.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(global: &Global, args: &Check) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let tables = config.state.open_tables()?;
    let names = match &args.table {
        None => Name::ALL.to_vec(),
        Some(table) => vec![named(table)?],
    };
    let kafka = config.ingest.kafka;
    let positions = |topic: &str, partition: i32| app_ids(&kafka, topic, partition);
    let findings = block_on(check::all(&tables, &names, &positions))??;
    let mut out = Output::stdout();
    match args.json {
        true => out.line(&findings)?,
        false if findings.is_empty() => out.text("nothing is wrong\n")?,
        false => findings
            .iter()
            .try_for_each(|f| out.text(&format!("{}: {}\n  repair: {}\n", f.table, f.detail, f.repair)))?,
    }
    out.flush()?;
    Ok(if findings.is_empty() { Exit::Done } else { Exit::Failed })
}

fn named(table: &str) -> Result<Name, Usage> {
    let known = || Name::ALL.map(|name| name.spec().name).join(", ");
    let name = Name::ALL.into_iter().find(|name| name.spec().name == table);
    name.ok_or_else(|| Usage(format!("there is no table {table:?}; choose one of {}", known())))
}

/// Returns the app ids of a partition under this source, in all its generations.
fn app_ids(kafka: &kafka::Settings, topic: &str, partition: i32) -> Vec<String> {
    let under = |generation| kafka::Settings { generation, ..kafka.clone() };
    let place = TopicPartition::new(topic, partition);
    (0..=kafka.generation).map(|generation| under(generation).app_id(&place)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_has_a_name_and_a_wrong_one_is_told_the_right_ones() {
        assert_eq!(named("dead_letters").unwrap(), Name::DeadLetters);
        assert!(named("letters").unwrap_err().to_string().contains("queries, dead_letters"));
    }
}
