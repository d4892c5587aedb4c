//! Tables in Azure's blobs, as Azurite keeps them: Microsoft's own stand-in, which checks signatures and conditions.
//!
//! Google's store has no case here: none of its emulators that were tried can hold a table (`docs/tables.md` has what was
//! asked and answered).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use object_store::azure::{AzureAccessKey, AzureAuthorizer, AzureCredential, MicrosoftAzureBuilder};
use object_store::client::{HttpConnector, HttpRequest, HttpRequestBody, ReqwestConnector};
use object_store::{ClientOptions, Error, ObjectStore, ObjectStoreExt, PutMode};
use rdkafka::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use taod::query_log::embedded::EmbeddedBroker;
use taod::table::{Name, Table, TableError, TableLocation, Tables, TxnStep};

use crate::harness::kafka::{call, once_each};
use crate::harness::{Outcome, cache, has, taod_in};

const TOPIC: &str = "llm-queries";
const CONTAINER: &str = "taod";
/// The account and the key that every Azurite has and Microsoft's manual prints.
const ACCOUNT: &str = "devstoreaccount1";
const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
/// What the rows to be erased hold, and no others.
const MARK: &str = "canary-51c0";

/// An Azurite with an empty container; dropping it kills it.
struct Azurite {
    process: Child,
    endpoint: String,
    _folder: tempfile::TempDir,
}

impl Azurite {
    async fn start() -> Option<Self> {
        let program = cache().join("azurite/node_modules/.bin/azurite-blob");
        if !has("azurite", program.is_file(), "run `tools/setup.sh full` (it needs Node.js)") {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut command = Command::new(program);
        command.args(["--blobHost", "127.0.0.1", "--blobPort", "0", "--silent", "--disableTelemetry", "--location"]);
        command.arg(folder.path()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map(Result::unwrap);
        // It chose a free port and tells which; it says nothing more until it ends.
        let listens = lines.find_map(|line| line.split_once("listens on ").map(|(_, url)| url.trim().to_owned()));
        let endpoint = format!("{}/{ACCOUNT}", listens.unwrap_or_else(|| panic!("Azurite ended before it listened")));
        let azurite = Azurite { process, endpoint, _folder: folder };
        azurite.create_container().await;
        Some(azurite)
    }

    /// Makes the container, which a store of objects cannot.
    async fn create_container(&self) {
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.method_mut() = "PUT".parse().unwrap();
        *request.uri_mut() = format!("{}/{CONTAINER}?restype=container", self.endpoint).parse().unwrap();
        let credential = AzureCredential::AccessKey(AzureAccessKey::try_new(KEY).unwrap());
        AzureAuthorizer::new(&credential, ACCOUNT).authorize(&mut request);
        let client = ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true)).unwrap();
        let response = client.execute(request).await.unwrap();
        assert_eq!(response.status().as_u16(), 201, "{response:?}");
    }

    /// Returns the container as a store of this process.
    fn store(&self) -> Arc<dyn ObjectStore> {
        let builder = MicrosoftAzureBuilder::new().with_account(ACCOUNT).with_access_key(KEY).with_allow_http(true);
        Arc::new(builder.with_endpoint(self.endpoint.clone()).with_container_name(CONTAINER).build().unwrap())
    }

    /// Returns the tables in a folder of the container.
    fn tables(&self, folder: &str) -> Tables {
        let url = format!("az://{CONTAINER}/{folder}/").parse().unwrap();
        Tables::at(TableLocation::with_store(url, self.store()))
    }

    /// Runs the program with the tables at a location, and the key in the environment.
    fn taod(&self, folder: &Path, tables: &str, arguments: &[&str], more: &[(&str, &str)]) -> Outcome {
        let text = format!(
            "[state]\ntables = {tables:?}\nstore_options = {{ account_name = {ACCOUNT:?}, endpoint = {:?}, \
             allow_http = \"true\" }}\n[ingest]\nidle_s = 1\n[ingest.kafka.properties]\n\
             \"session.timeout.ms\" = \"6000\"\n[maintenance]\ncompact_from_files = 2\n",
            self.endpoint
        );
        std::fs::write(folder.join("taod.toml"), text).unwrap();
        let arguments = [arguments, &["--config", "taod.toml"]].concat();
        taod_in(folder, &arguments, &[&[("AZURE_STORAGE_ACCOUNT_KEY", KEY)], more].concat())
    }

    /// Returns the names of a table's data files, also of those that no version names any more.
    async fn data_files(&self, table: &str) -> Vec<String> {
        let prefix = table.into();
        let objects: Vec<_> = self.store().list(Some(&prefix)).try_collect().await.unwrap();
        let names = objects.into_iter().map(|object| object.location.to_string());
        names.filter(|name| name.ends_with(".parquet") && !name.contains("_delta_log")).collect()
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Puts two calls into each of two partitions; the first of a partition holds the mark.
fn send(broker: &EmbeddedBroker, round: usize) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", broker.brokers()).create().unwrap();
    for partition in 0..2 {
        for text in [format!("{MARK} {round}"), format!("question {round} of {partition}")] {
            let record = call(&text);
            let record = BaseRecord::<(), str>::to(TOPIC).partition(partition).payload(&record);
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
    }
    producer.flush(Duration::from_secs(10)).unwrap();
}

async fn rows(tables: &Tables) -> Vec<Value> {
    tables.open_one(Name::Queries).await.unwrap().rows(None).await.unwrap()
}

/// Returns how often each record is among the rows, by partition and offset.
fn places(rows: &[Value]) -> BTreeMap<(i64, i64), usize> {
    let mut places = BTreeMap::new();
    for row in rows {
        let number = |key: &str| row[key].as_i64().unwrap();
        *places.entry((number("partition"), number("offset"))).or_default() += 1;
    }
    places
}

#[tokio::test(flavor = "multi_thread")]
async fn on_azure_rows_land_once_over_a_kill_and_are_checked_joined_and_erased() {
    let Some(azurite) = Azurite::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::start(TOPIC, 2).unwrap();
    let (by_container, by_account) =
        (format!("az://{CONTAINER}/a/b"), format!("abfss://{CONTAINER}@{ACCOUNT}.dfs.core.windows.net/a/b"));
    let ingest = |tables: &str, crash_at: &str| {
        let more = [("TAOD__INGEST__KAFKA__BROKERS", broker.brokers()), ("TAOD_CRASH_AT", crash_at)];
        azurite.taod(folder.path(), tables, &["ingest", "--until-idle"], &more)
    };
    let table = |arguments: &[&str]| {
        azurite.taod(folder.path(), &by_container, &[&["table"], arguments].concat(), &[]).code(0).out
    };
    let tables = azurite.tables("a/b");
    // The third entry of a run is the first with rows: killed there, it has stored some and was told of none.
    let runs = [(&by_container, "", 0), (&by_account, "after_put:3", -1), (&by_container, "", 0)];
    for (round, (location, crash_at, code)) in runs.into_iter().enumerate() {
        send(&broker, round);
        ingest(location, crash_at).code(code);
        assert!(rows(&tables).await.len() > 4 * round, "run {round} stored nothing");
    }
    assert_eq!(places(&rows(&tables).await), once_each(2, 0..6));
    assert_eq!(table(&["check"]), "nothing is wrong\n");

    let before = azurite.data_files("a/b/queries").await;
    assert!(before.len() > 1, "{before:?}");
    let reports: Vec<Value> = serde_json::from_str(&table(&["maintain", "--json"])).unwrap();
    let queries = reports.iter().find(|report| report["table"] == "queries").unwrap();
    assert_eq!(queries["files"], 1, "{queries}");
    let joined = azurite.data_files("a/b/queries").await;
    assert_eq!(joined.len(), before.len() + 1, "the joined file, and those that older versions name");

    let receipt = table(&["erase", "--where", &format!("messages like '%{MARK}%'"), "--json"]);
    let receipt: Value = serde_json::from_str(receipt.trim()).unwrap();
    assert_eq!((&receipt["complete"], &receipt["tables"]["queries"]["rows"]), (&json!(true), &json!(6)));
    let left = rows(&tables).await;
    assert!(left.iter().all(|row| !row.to_string().contains(MARK)), "{left:?}");
    let others = once_each(2, 0..6).into_iter().filter(|((_, offset), _)| offset % 2 == 1).collect();
    assert_eq!(places(&left), others);
    let after = azurite.data_files("a/b/queries").await;
    assert!(after.len() == 1 && !joined.contains(&after[0]), "files with erased rows are still there: {after:?}");
    assert_eq!(table(&["check"]), "nothing is wrong\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_azure_a_wrong_key_is_named_and_nothing_is_made() {
    let Some(azurite) = Azurite::start().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let broker = EmbeddedBroker::start(TOPIC, 1).unwrap();
    let location = format!("az://{CONTAINER}/wrong-key");
    let wrong = [("TAOD__INGEST__KAFKA__BROKERS", broker.brokers()), ("AZURE_STORAGE_ACCOUNT_KEY", "bm90IHRoZSBrZXk=")];
    let outcome = azurite.taod(folder.path(), &location, &["ingest", "--until-idle"], &wrong);
    outcome.refused(&["az://taod/wrong-key/queries", "state.store_options"]);
    let made: Vec<_> = azurite.store().list(None).try_collect().await.unwrap();
    assert!(made.is_empty(), "{made:?}");
}

fn letter(writer: usize, offset: i64) -> Value {
    json!({ "topic": TOPIC, "partition": writer, "offset": offset, "record_index": 0, "ingest_date": "2026-02-03",
        "payload": "00", "reason": "r", "message": "m", "taod_version": "0", "config_hash": "c" })
}

async fn append(table: &mut Table, writer: usize, app: &str, offset: i64) -> Result<u64, TableError> {
    let step = TxnStep { app_id: app.to_owned(), expect: (offset > 0).then_some(offset), set: offset + 1 };
    table.append_rows(&[letter(writer, offset)], &[step]).await.map(|appended| appended.version)
}

#[tokio::test(flavor = "multi_thread")]
async fn on_azure_a_conditional_create_is_refused_where_the_entry_exists() {
    let Some(azurite) = Azurite::start().await else { return };
    let (store, entry) = (azurite.store(), "x/_delta_log/00000000000000000000.json".into());
    store.put_opts(&entry, "first".into(), PutMode::Create.into()).await.unwrap();
    let second = store.put_opts(&entry, "second".into(), PutMode::Create.into()).await;
    assert!(matches!(second, Err(Error::AlreadyExists { .. })), "{second:?}");
    assert_eq!(store.get(&entry).await.unwrap().bytes().await.unwrap(), "first");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_azure_the_slower_of_two_writers_is_fenced_off_and_strangers_both_land() {
    let Some(azurite) = Azurite::start().await else { return };
    let tables = azurite.tables("two");
    let mut a = tables.open_one(Name::DeadLetters).await.unwrap();
    let mut b = tables.open_one(Name::DeadLetters).await.unwrap();
    // Both write at the version after the one they know, by turns one of them first.
    for offset in 0..6 {
        let (first, second) = if offset % 2 == 0 { (&mut a, &mut b) } else { (&mut b, &mut a) };
        let version = append(first, 0, "shared", offset).await.unwrap();
        let refused = append(second, 0, "shared", offset).await;
        assert!(matches!(refused, Err(TableError::Fenced { .. })), "{refused:?}");
        assert_eq!((version, second.version()), (offset as u64 + 1, version), "the refused one has read on");
    }
    // Positions of their own: none is fenced, each finds entries that the other wrote first.
    let all_of = async |table: &mut Table, writer: usize| {
        for offset in 0..12 {
            append(table, writer, &format!("own/{writer}"), offset).await.unwrap();
        }
    };
    tokio::join!(all_of(&mut a, 1), all_of(&mut b, 2));
    a.refresh().await.unwrap();
    assert_eq!(a.version(), 6 + 24);
    let expected: BTreeMap<_, _> =
        once_each(1, 0..6).into_iter().chain(once_each(3, 0..12).into_iter().filter(|((p, _), _)| *p > 0)).collect();
    assert_eq!(places(&a.rows::<Value>(None).await.unwrap()), expected);
}
