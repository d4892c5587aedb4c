//! The tables: whether each opens as what it is, and whether their place takes a commit.

use super::{Check, Finding};
use crate::config::Config;
use crate::table::{Look, Name, Tables};

/// Looks at every table, then writes beside them.
pub(super) async fn check(config: &Config) -> Vec<Finding> {
    let tables = match config.state.open_tables() {
        Ok(tables) => tables,
        Err(error) => return vec![Finding::failure(Check::Tables, error.to_string(), "correct state.tables")],
    };
    let mut findings = Vec::new();
    let (mut ready, mut absent) = (0, 0);
    for name in Name::ALL {
        match tables.look(name).await {
            Ok(Look::Ready(_)) => ready += 1,
            Ok(Look::Absent) if name == Name::Queries && !tables.keeps(name) => {
                let says = format!("state.log = {:?} holds no table queries", config.state.log);
                let remedy = "start the daemon that keeps the log, or correct state.log";
                findings.push(Finding::failure(Check::Tables, says, remedy));
            }
            Ok(Look::Absent) => absent += 1,
            Ok(Look::Older { lacking }) => findings.push(older(name, &lacking)),
            Err(error) if error.is_foreign() => {
                let remedy =
                    "set state.tables to a place that is taod's alone, or restore the table (docs/runbooks/restore.md)";
                findings.push(Finding::failure(Check::Tables, error.to_string(), remedy));
            }
            Err(error) => {
                let remedy =
                    "see that the store is reached and that its credentials are in the environment; docs/tables.md";
                findings.push(Finding::failure(Check::Tables, error.to_string(), remedy));
                // The others would wait for the same store.
                break;
            }
        }
    }
    if findings.is_empty() {
        let root = tables.root();
        let made = if absent > 0 { format!("; {absent} more are made when they are needed") } else { String::new() };
        findings.push(Finding::ok(Check::Tables, format!("{root} has {ready} tables{made}")));
    }
    findings.extend(writable(&tables).await);
    findings
}

fn older(name: Name, lacking: &[String]) -> Finding {
    let says = format!("{} lacks {} of this taod", name.spec().name, lacking.join(", "));
    Finding::warning(Check::Tables, says, "nothing: the daemon adds the columns when it starts")
}

/// Writes beside the tables; nothing where their folder is not made yet, which the check of the state answers for.
async fn writable(tables: &Tables) -> Option<Finding> {
    if tables.root().folder().is_some_and(|folder| !folder.exists()) {
        return None;
    }
    let error = tables.root().prove_writable().await.err()?;
    let remedy = match error.is_foreign() {
        true => "use a store with conditional writes; docs/tables.md has those that were tried",
        false => "give taod's user the right to create and delete there",
    };
    Some(Finding::failure(Check::Tables, error.to_string(), remedy))
}
