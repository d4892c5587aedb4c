//! Whether what is asked since the last round is another population than what was asked before it: a reason to begin a round.
//!
//! A round compares its held-out prompts after clustering ([`super::population`]); that costs a census of the log. This looks
//! between rounds, so it draws distinct prompts from both sides by their hash, which no sender chooses, and counts them by the
//! same features under the same index and the same bound of chance. Near duplicates are not joined: a flood of one question in
//! many variants looks like a shift, and the round that it starts tells the difference.

use chrono::{DateTime, Duration, Utc};
use serde::Deserialize;
use serde_json::Value;

use super::RoundError;
use crate::dataset::Prompt;
use crate::dataset::population::{Profile, Settings, Shift, compare};
use crate::record::{Coordinates, Message};
use crate::table::{Name, Table, TableError, Tables};

/// Distinct prompts that are drawn from each side, about.
const DRAWN: u64 = 2000;
/// Days before the round of which prompts are compared: whole weeks, so that every day of the week is in them.
const DAYS: i64 = 7;

/// Which prompts are compared: those since `since` with those of the week before, where the condition holds.
#[derive(Debug, Clone, Copy)]
pub struct Question<'a> {
    pub since: DateTime<Utc>,
    /// SQL over the columns of `queries`; "true" for all.
    pub wanted: &'a str,
    /// The index from which a feature has shifted, and the least prompts on each side.
    pub settings: &'a Settings,
}

/// Returns the features that shifted; nothing where there are too few prompts to tell.
pub async fn shifted(tables: &Tables, question: &Question<'_>) -> Result<Vec<Shift>, RoundError> {
    let Some(queries) = tables.open_existing(Name::Queries).await? else { return Ok(Vec::new()) };
    let (since, week) = (question.since, question.since - Duration::days(DAYS));
    let before = profile(&queries, &format!("{} and {}", at(">=", week), at("<", since)), question.wanted).await?;
    let after = profile(&queries, &at(">=", since), question.wanted).await?;
    Ok(compare(&before, &after, question.settings).into_iter().filter(|shift| shift.alarm).collect())
}

fn at(relation: &str, time: DateTime<Utc>) -> String {
    let us = time.timestamp_micros();
    format!("event_time {relation} arrow_cast({us}, 'Timestamp(Microsecond, Some(\"UTC\"))')")
}

async fn profile(queries: &Table, when: &str, wanted: &str) -> Result<Profile, TableError> {
    #[derive(Deserialize)]
    struct Count {
        n: u64,
    }
    #[derive(Deserialize)]
    struct Row {
        prompt_hash: String,
        workload: Option<String>,
        tenant: Option<String>,
        messages: Value,
        has_tools: bool,
    }
    let which = format!("kind = 'call' and train_ok and {wanted} and {when}");
    let counted: Vec<Count> =
        queries.select(&format!("select approx_distinct(prompt_hash) as n from t where {which}")).await?;
    let distinct = counted.first().map_or(0, |count| count.n);
    let below = below(distinct);
    let rows: Vec<Row> = queries
        .select(&format!(
            "select prompt_hash, first_value(workload) as workload, first_value(tenant) as tenant, \
             first_value(messages) as messages, bool_or(tools is not null) as has_tools \
             from t where {which} and prompt_hash < '{below}' group by prompt_hash"
        ))
        .await?;
    let prompt = |row: Row| {
        let nowhere = Coordinates { topic: String::new(), partition: 0, offset: 0, record_index: 0 };
        let (cluster, messages) = (row.prompt_hash.clone(), messages(&row.messages)?);
        Some(Prompt {
            workload: row.workload,
            tenant: row.tenant,
            tools: row.has_tools.then_some(crate::json::Value::Null),
            ..Prompt::bare(row.prompt_hash, cluster, messages, nowhere)
        })
    };
    let prompts: Vec<Prompt> = rows.into_iter().filter_map(prompt).collect();
    Ok(Profile::of(&prompts, i64::MIN))
}

/// Returns the hash below which so many of `distinct` hashes lie as are drawn; one that is above all where they are few.
fn below(distinct: u64) -> String {
    match distinct.checked_div(DRAWN) {
        Some(times) if times >= 1 => {
            let share = DRAWN as f64 / distinct as f64;
            format!("{:08x}", (share * f64::from(u32::MAX)) as u32)
        }
        _ => "g".into(),
    }
}

/// Reads messages whether the table gives them as a tree or as text.
fn messages(value: &Value) -> Option<Vec<Message>> {
    match value.as_str() {
        Some(text) => serde_json::from_str(text).ok(),
        None => serde_json::from_value(value.clone()).ok(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::record::prompt_hash;

    /// Rows of an hour: prompts of `words` words each, and each asked twice.
    fn rows(first: usize, day: &str, words: usize) -> Vec<Value> {
        let row = |n: usize| {
            let text = vec![format!("word{n}"); words].join(" ");
            let messages = [Message::text("user", text)];
            json!({
                "topic": "calls", "partition": 0, "offset": first + n, "record_index": 0,
                "event_time": format!("{day}T12:{:02}:00Z", n % 60), "ingest_date": day, "kind": "call", "status": 200,
                "messages": json!(messages).to_string(), "params": {}, "prompt_hash": prompt_hash(&messages, None),
                "tenant": if n.is_multiple_of(2) { "acme" } else { "other" },
                "format": "openai", "redacted": false, "train_ok": true, "sample_weight": 1.0, "truncated": false,
                "taod_version": "0", "config_hash": "none", "extra": {},
            })
        };
        (0..400).map(|n| row(n / 2)).collect()
    }

    async fn features(days: &[(&str, usize)], wanted: &str) -> Vec<&'static str> {
        let folder = tempfile::tempdir().unwrap();
        let tables = Tables::open(folder.path()).unwrap();
        let mut queries = tables.open_one(Name::Queries).await.unwrap();
        for (at, (day, words)) in days.iter().enumerate() {
            queries.append_rows(&rows(1000 * at, day, *words), &[]).await.unwrap();
        }
        let settings = Settings::default();
        let question = Question { since: "2026-05-10T00:00:00Z".parse().unwrap(), wanted, settings: &settings };
        shifted(&tables, &question).await.unwrap().into_iter().map(|shift| shift.feature.as_str()).collect()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn other_prompts_are_told_and_the_same_ones_are_not() {
        assert_eq!(features(&[("2026-05-09", 3), ("2026-05-10", 3)], "true").await, [""; 0]);
        assert_eq!(features(&[("2026-05-09", 3), ("2026-05-10", 40)], "true").await, ["length"]);
        let none = features(&[("2026-05-01", 3), ("2026-05-10", 40)], "true").await;
        assert_eq!(none, [""; 0], "what is older than a week is no comparison");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn only_the_traffic_that_the_daemon_is_about_counts() {
        let days = [("2026-05-09", 3), ("2026-05-10", 40)];
        assert_eq!(features(&days, "tenant = 'acme'").await, ["length"]);
        assert_eq!(features(&days, "tenant = 'nobody'").await, [""; 0]);
    }

    #[test]
    fn the_hash_to_draw_below_follows_from_the_count() {
        assert_eq!((below(0).as_str(), below(1999).as_str()), ("g", "g"));
        assert_eq!(below(2 * DRAWN), "7fffffff");
        assert_eq!(below(DRAWN), "ffffffff");
    }
}
