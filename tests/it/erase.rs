//! Erasure end to end: the program on a state folder, killed and run again, and no byte of the subject afterwards.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use taod::ingest::keyed_hash;
use taod::query_log::embedded::EmbeddedBroker;
use taod::record::{Message, prompt_hash};
use taod::table::{ERASURES, Name, TableError, Tables, batch_of_any, schema};

use crate::harness::night::bytes_below;
use crate::harness::{Outcome, taod_in};

/// What every text of the subject holds, and nothing of others.
const MARK: &str = "canary-7f3a";
const SUBJECT: &str = "alice@example.org";
const KEY: &str = "0123456789abcdef0123456789abcdef";
const ENVIRONMENT: [(&str, &str); 2] = [("TAOD__INGEST__USER_KEY", KEY), ("TAOD__STATE__DIR", "state")];

fn call(offset: i64, user: &str, text: &str) -> Value {
    let messages = [Message::text("user", text)];
    json!({
        "topic": "calls", "partition": 0, "offset": offset, "record_index": 0,
        "event_time": "2026-05-01T12:00:00Z", "ingest_date": "2026-05-01", "kind": "call",
        "request_id": format!("req-{offset}"), "user_hash": keyed_hash(KEY.as_bytes(), user).unwrap(),
        "status": 200, "messages": json!(messages).to_string(), "params": "{}", "response": text,
        "prompt_hash": prompt_hash(&messages, None), "format": "openai", "redacted": false, "train_ok": true,
        "sample_weight": 1.0, "truncated": false, "taod_version": "0", "config_hash": "none", "extra": "{}",
    })
}

/// Returns the call of an offset: every seventh is the subject's.
fn nth(offset: i64) -> Value {
    match offset % 7 {
        3 => call(offset, SUBJECT, &format!("{MARK} secret {offset}")),
        _ => call(offset, "bob", &format!("question {offset}")),
    }
}

fn erase(folder: &Path, arguments: &[&str]) -> Outcome {
    taod_in(folder, &[&["table", "erase"], arguments].concat(), &ENVIRONMENT)
}

fn receipt(outcome: Outcome) -> Value {
    serde_json::from_str(outcome.code(0).out.trim()).unwrap()
}

/// Returns the files below a folder that hold one of the needles, Parquet files decoded.
fn holders(folder: &Path, needles: &[&str]) -> Vec<String> {
    let holds = |bytes: &[u8]| {
        needles.iter().any(|needle| bytes.windows(needle.len()).any(|window| window == needle.as_bytes()))
    };
    let decoded = |bytes: Vec<u8>| {
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(bytes)).unwrap().build().unwrap();
        let mut text = Vec::new();
        for batch in reader.map(Result::unwrap) {
            // Binary columns come out in hex, so those are looked at as they are.
            for column in batch.columns() {
                text.extend(column.to_data().buffers().iter().flat_map(|buffer| buffer.as_slice().to_vec()));
                text.push(0);
            }
        }
        text
    };
    let files = bytes_below(folder).into_iter();
    let hit = |(path, bytes): (String, Vec<u8>)| {
        let found =
            holds(&bytes) || (path.ends_with(".parquet") && !path.contains("_delta_log") && holds(&decoded(bytes)));
        found.then_some(path)
    };
    files.filter_map(hit).collect()
}

/// Appends as ingestion does: what an erasure fenced is made anew, from what may still be stored.
async fn write_on(tables: Tables, from: i64, stop: Arc<AtomicBool>) -> i64 {
    let mut offset = from;
    'session: loop {
        let mut queries = tables.open_one(Name::Queries).await.unwrap();
        queries.hold(ERASURES).await.unwrap();
        while !stop.load(Ordering::Relaxed) {
            let erased = taod::table::Suppressions::load(&tables).await.unwrap();
            let rows: Vec<Value> = (offset..offset + 7).map(nth).collect();
            let kept = rows.into_iter().filter(|row| !erased.hides_call(row["user_hash"].as_str(), None));
            let batch = batch_of_any(&schema::QUERIES, &kept.collect::<Vec<_>>()).unwrap();
            match queries.append(&[batch], &[]).await {
                Ok(_) => offset += 7,
                Err(TableError::Fenced { .. }) => continue 'session,
                Err(error) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        return offset;
    }
}

fn spawn(folder: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
    command.args(["table", "erase"]).args(arguments).current_dir(folder).envs(ENVIRONMENT);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Waits until something outside holds.
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_thousand_files_under_a_writer_no_row_of_the_subject_is_left_and_no_other_lost() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let tables = Tables::open(&state.join("tables")).unwrap();
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    for file in 0..1000 {
        let rows: Vec<Value> = (file * 7..file * 7 + 7).map(nth).collect();
        queries.append(&[batch_of_any(&schema::QUERIES, &rows).unwrap()], &[]).await.unwrap();
    }
    let letters =
        [(1, format!(r#"{{"user":"{SUBJECT}","x":"{MARK}"#)), (2, "nobody's".to_owned())].map(|(offset, text)| {
            json!({ "topic": "other", "partition": 0, "offset": offset, "record_index": 0, "ingest_date": "2026-05-01",
                "payload": hex::encode(text), "reason": "not_json", "message": "m", "taod_version": "0",
                "config_hash": "c" })
        });
    let mut dead = tables.open_one(Name::DeadLetters).await.unwrap();
    dead.append(&[batch_of_any(&schema::DEAD_LETTERS, &letters).unwrap()], &[]).await.unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let writer = tokio::spawn(write_on(tables.clone(), 7000, Arc::clone(&stop)));
    let log = state.join("tables/queries/_delta_log");
    let deletes = || {
        let entries = std::fs::read_dir(&log).unwrap().flatten().map(|entry| entry.path());
        let entries = entries.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
        entries.filter(|path| std::fs::read_to_string(path).is_ok_and(|text| text.contains("\"DELETE\""))).count()
    };
    for kill in 1..=3 {
        // Killed with some of its commits made and some not: each time a few more.
        let mut child = spawn(folder.path(), &["--user", SUBJECT]);
        until("the next commit of the erasure", || deletes() >= 3 * kill);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let before = receipt_file(&state);
    assert_eq!(before["complete"], false);
    let begun = Instant::now();
    let receipt = receipt(erase(folder.path(), &["--user", SUBJECT, "--json"]));
    eprintln!("the last of four runs took {:.1} s", begun.elapsed().as_secs_f64());
    stop.store(true, Ordering::Relaxed);
    let end = writer.await.unwrap();

    assert_eq!(receipt["complete"], true);
    assert_eq!(receipt["id"], before["id"], "the interrupted erasure was finished, no second one begun");
    let all: Vec<Value> =
        tables.open_one(Name::Queries).await.unwrap().select("select \"offset\", user_hash from t").await.unwrap();
    let mut offsets: Vec<i64> = all.iter().map(|row| row["offset"].as_i64().unwrap()).collect();
    offsets.sort_unstable();
    assert_eq!(offsets, (0..end).filter(|offset| offset % 7 != 3).collect::<Vec<_>>());
    let letters: Vec<Value> = tables.open_one(Name::DeadLetters).await.unwrap().rows(None).await.unwrap();
    assert_eq!(letters.iter().map(|row| row["offset"].as_i64().unwrap()).collect::<Vec<_>>(), [2]);
    let hash = keyed_hash(KEY.as_bytes(), SUBJECT).unwrap();
    assert_eq!(holders(&state, &[MARK, SUBJECT]), Vec::<String>::new());
    let held = holders(&state, &[&hash]);
    assert!(held.iter().all(|path| path.starts_with("tables/suppressions/")), "{held:?}");
    assert_eq!(receipt["tables"]["dead_letters"]["rows"], 1);
    let text = receipt_file(&state).to_string();
    assert!(!text.contains("alice") && !text.contains("req-") && text.contains("subject_hash"), "{text}");
}

/// Returns the only receipt.
fn receipt_file(state: &Path) -> Value {
    let mut found: Vec<(String, Vec<u8>)> = bytes_below(&state.join("erasures"));
    found.retain(|(name, _)| name.ends_with(".json") && !name.starts_with('.'));
    assert_eq!(found.len(), 1, "{found:?}");
    serde_json::from_slice(&found[0].1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn reading_the_topic_again_does_not_bring_the_rows_back() {
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::start("llm-queries", 1).unwrap();
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", broker.brokers()).create().unwrap();
    let record = |user: &str, id: &str, text: &str| {
        json!({ "request": { "model": "m", "user": user, "messages": [{ "role": "user", "content": text }] },
                "response": { "id": id, "object": "chat.completion", "model": "m", "choices": [{ "index": 0,
                "message": { "role": "assistant", "content": "fine" }, "finish_reason": "stop" }] } })
        .to_string()
    };
    let records = [
        record(SUBJECT, "r-1", MARK),
        record("bob", "r-2", "hello"),
        record("carol", "r-3", "hi"),
        format!("{{ broken {MARK} {SUBJECT}"),
    ];
    for payload in &records {
        producer.send(BaseRecord::<(), str>::to("llm-queries").payload(payload)).map_err(|(e, _)| e).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
    let ingest = |generation: &str| -> Value {
        let mut environment = ENVIRONMENT.to_vec();
        let more =
            [("TAOD__INGEST__KAFKA__BROKERS", broker.brokers()), ("TAOD__INGEST__KAFKA__GENERATION", generation)];
        environment.extend(more);
        let outcome = taod_in(folder.path(), &["ingest", "--until-idle", "--json"], &environment).code(0);
        serde_json::from_str(outcome.out.trim()).unwrap()
    };
    let first = ingest("0");
    assert_eq!((&first["rows"], &first["records"]), (&json!(3), &json!(4)));
    let dry = receipt(erase(folder.path(), &["--user", SUBJECT, "--dry-run", "--json"]));
    assert_eq!((&dry["tables"]["queries"]["rows"], &dry["tables"]["dead_letters"]["rows"]), (&json!(1), &json!(1)));
    assert!(!holders(&folder.path().join("state"), &[MARK]).is_empty(), "a dry run changes nothing");
    receipt(erase(folder.path(), &["--user", SUBJECT, "--json"]));
    receipt(erase(folder.path(), &["--request-id", "r-3", "--json"]));
    assert_eq!(holders(&folder.path().join("state"), &[MARK, SUBJECT]), Vec::<String>::new());
    let second = ingest("1");
    assert_eq!((&second["rows"], &second["records"]), (&json!(1), &json!(4)), "{second}");
    assert_eq!((&second["skipped"]["erased"], &second["dead_letters"]), (&json!(3), &json!({})), "{second}");
    assert_eq!(holders(&folder.path().join("state"), &[MARK, SUBJECT]), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_round_that_reads_the_rows_is_stopped_and_never_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let tables = Tables::open(&state.join("tables")).unwrap();
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    queries.append(&[batch_of_any(&schema::QUERIES, &[nth(1), nth(3)]).unwrap()], &[]).await.unwrap();
    // A round as it stands while it samples: frozen, and no outcome.
    let round = state.join("rounds/round-00001");
    std::fs::create_dir_all(round.join("dataset")).unwrap();
    std::fs::create_dir_all(round.join("pass-1/candidates")).unwrap();
    std::fs::create_dir_all(state.join("rounds/round-00000")).unwrap();
    let line = |offset| {
        format!("{}\n", json!({ "prompt_hash": nth(offset)["prompt_hash"], "messages": nth(offset)["messages"] }))
    };
    for (path, text) in [
        ("plan.json", "{}".to_owned()),
        ("dataset/manifest.json", "{}".to_owned()),
        ("dataset/train.jsonl", line(1) + &line(3)),
        ("pass-1/candidates/chunk-00000.jsonl", line(3) + &line(1)),
        ("pass-1/candidates/.tmp-killed", line(3)),
        // A round that was killed before it had a line.
        ("../round-00000/.tmp-killed", line(3)),
    ] {
        std::fs::write(round.join(path), text).unwrap();
    }
    let lock = state.join("round.lock");
    let script = format!("echo $$ > {0:?}; exec sleep 600", lock);
    let child =
        Command::new("flock").arg("--no-fork").arg(&lock).args(["sh", "-c", &script]).stdin(Stdio::null()).spawn();
    let mut child = child.unwrap();
    until("the round's process", || {
        std::fs::read_to_string(&lock).is_ok_and(|text| text.trim().parse::<u32>().is_ok())
    });

    receipt(erase(folder.path(), &["--request-id", "nobody's", "--json"]));
    assert!(child.try_wait().unwrap().is_none(), "no row went, so no round is stopped");
    let receipt = receipt(erase(folder.path(), &["--where", &format!("messages like '%{MARK}%'"), "--json"]));
    assert!(!child.wait().unwrap().success(), "the round's process was told to end");
    assert_eq!((&receipt["stopped_round"], &receipt["rounds"]), (&json!("round-00001"), &json!(["round-00001"])));
    assert_eq!((&receipt["tables"]["queries"]["rows"], &receipt["round_lines"]), (&json!(1), &json!(2)));
    assert_eq!(holders(&state, &[MARK]), Vec::<String>::new());
    assert_eq!(std::fs::read_to_string(round.join("dataset/train.jsonl")).unwrap(), line(1));
    assert_eq!(taod::round::Paths::new(&state).unfinished().unwrap(), None, "it is not resumed");
    let rows: Vec<Value> = tables.open_one(Name::Rounds).await.unwrap().rows(None).await.unwrap();
    assert_eq!((&rows[0]["round"], &rows[0]["state"]), (&json!("round-00001"), &json!("erased")));
}

#[test]
fn what_cannot_be_erased_is_refused_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let state = [("TAOD__STATE__DIR", "state")];
    taod_in(folder.path(), &["table", "erase", "--user", "u"], &state).refused(&["ingest.user_key", "--request-id"]);
    erase(folder.path(), &["--where", "tenantt = 'a'"]).refused(&["tenantt = 'a'", "queries"]);
    erase(folder.path(), &["--where", "tenant ="]).refused(&["tenant ="]);
    erase(folder.path(), &[]).code(64);
    erase(folder.path(), &["--user", "a", "--where", "true"]).code(64);
    // Nothing of it was written down, to be taken up again and again.
    assert!(!folder.path().join("state/erasures").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erasure_that_cannot_be_finished_stops_neither_the_others_nor_maintenance() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let tables = Tables::open(&state.join("tables")).unwrap();
    let mut queries = tables.open_one(Name::Queries).await.unwrap();
    queries.append(&[batch_of_any(&schema::QUERIES, &[nth(1), nth(3)]).unwrap()], &[]).await.unwrap();
    // Two plans as a killed erasure leaves them; the first can never be carried out.
    let erasures = state.join("erasures");
    receipt(erase(folder.path(), &["--request-id", "req-99", "--json"]));
    let done = receipt_file(&state);
    for (id, subject) in [("0001", json!({ "where": "1 / 0 = 1" })), ("0002", json!({ "requests": ["req-3"] }))] {
        let mut begun = done.clone();
        (begun["id"], begun["complete"]) = (json!(id), json!(false));
        let plan = json!({ "subject": subject, "prompts": [], "records": [], "receipt": begun });
        std::fs::write(erasures.join(format!("{id}.plan")), plan.to_string()).unwrap();
    }
    let lock = std::fs::File::options().write(true).open(erasures.join("lock")).unwrap();
    lock.lock().unwrap();
    erase(folder.path(), &["--request-id", "req-1"]).refused(&["another erasure is running"]);
    let maintain = || taod_in(folder.path(), &["table", "maintain", "--json"], &ENVIRONMENT);
    maintain().code(0);
    assert!(erasures.join("0002.plan").exists(), "what another process works on is left to it");
    drop(lock);
    let failed = maintain();
    let reports: Vec<Value> = serde_json::from_str(&failed.code(1).out).unwrap();
    assert!(reports.iter().any(|report| report["table"] == "queries"), "{reports:?}");
    assert!(erasures.join("0001.plan").exists() && !erasures.join("0002.plan").exists());
    let rows: Vec<Value> = tables.open_one(Name::Queries).await.unwrap().rows(None).await.unwrap();
    assert_eq!(rows.iter().map(|row| row["request_id"].as_str().unwrap()).collect::<Vec<_>>(), ["req-1"]);
    erase(folder.path(), &["--resume"]).refused(&["0001.plan", "remove that file"]);
}
