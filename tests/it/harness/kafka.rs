//! A real Apache Kafka, members of its groups, and what the tables hold of its topics.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use serde_json::{Value, json};
use taod::table::{Name, Table, Tables};

use super::{has, root};

/// A single-node Apache Kafka; dropping it kills it.
pub(crate) struct Kafka {
    folder: tempfile::TempDir,
    port: u16,
}

impl Kafka {
    /// Starts it with more lines for its properties, or returns nothing where this machine cannot.
    pub(crate) fn start(more: &[&str]) -> Option<Self> {
        Self::start_at(Self::port(2)?, more, &[])
    }

    /// Returns the first of so many free ports in a row, of which a broker takes two; nothing where there can be no broker.
    pub(crate) fn port(count: u16) -> Option<u16> {
        let there = script(&["have"], &[]).is_ok();
        has("kafka", there, "run `tests/kafka/kafka.sh get` (it needs Java 17 and Maven)").then(|| free_ports(count))
    }

    /// Starts it at a port, with more environment.
    pub(crate) fn start_at(port: u16, more: &[&str], environment: &[(&str, &str)]) -> Option<Self> {
        let kafka = Kafka { folder: tempfile::tempdir().unwrap(), port };
        let (data, port) = (kafka.data(), port.to_string());
        script(&[&["start", &data, &port], more].concat(), environment).unwrap();
        Some(kafka)
    }

    fn data(&self) -> String {
        self.folder.path().join("broker").display().to_string()
    }

    pub(crate) fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", self.brokers());
        config
    }

    pub(crate) fn admin(&self) -> AdminClient<DefaultClientContext> {
        self.client().create().unwrap()
    }

    pub(crate) async fn create_topic(&self, name: &str, partitions: i32) {
        self.create_topic_with(name, partitions, &[]).await;
    }

    pub(crate) async fn create_topic_with(&self, name: &str, partitions: i32, config: &[(&str, &str)]) {
        let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
        topic.config.extend_from_slice(config);
        let created = self.admin().create_topics(&[topic], &AdminOptions::new()).await.unwrap();
        created.into_iter().for_each(|one| drop(one.unwrap()));
    }

    /// Puts records into a partition of a topic, in this order; `None` is a tombstone.
    pub(crate) fn send<'a>(&self, topic: &str, partition: i32, payloads: impl IntoIterator<Item = Option<&'a [u8]>>) {
        let mut config = self.client();
        let producer: BaseProducer =
            config.set("message.max.bytes", "33554432").set("enable.idempotence", "true").create().unwrap();
        for payload in payloads {
            let mut record = BaseRecord::<[u8], [u8]>::to(topic).partition(partition).key(b"k");
            record.payload = payload;
            producer.send(record).map_err(|(error, _)| error).unwrap();
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        assert_eq!(producer.in_flight_count(), 0);
    }

    /// Puts so many calls into each of the first `partitions` of a topic.
    pub(crate) fn send_calls(&self, topic: &str, partitions: i32, count: usize) {
        for partition in 0..partitions {
            let calls: Vec<String> = (0..count).map(|i| call(&format!("call {i} of {partition}"))).collect();
            self.send(topic, partition, calls.iter().map(|call| Some(call.as_bytes())));
        }
    }

    /// Begins the settings of a member that reads a topic.
    pub(crate) fn member(&self, topic: &str) -> Member {
        Member { brokers: self.brokers(), topic: topic.to_owned(), settings: String::new(), tables: String::new() }
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        script(&["stop", &self.data(), "-9"], &[]).ok();
    }
}

fn script(arguments: &[&str], environment: &[(&str, &str)]) -> Result<(), String> {
    let mut command = Command::new(root().join("tests/kafka/kafka.sh"));
    let output = command.args(arguments).envs(environment.iter().copied()).output().map_err(|e| e.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

fn free_ports(count: u16) -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        let is_free = |offset| port.checked_add(offset).is_some_and(|p| TcpListener::bind(("127.0.0.1", p)).is_ok());
        if (1..count).all(is_free) {
            return port;
        }
    }
}

/// The settings of a member of a group.
#[derive(Clone)]
pub(crate) struct Member {
    pub brokers: String,
    topic: String,
    settings: String,
    tables: String,
}

impl Member {
    /// Adds a line to `ingest.kafka`.
    pub(crate) fn setting(mut self, line: &str) -> Self {
        self.settings += &format!("{line}\n");
        self
    }

    /// Adds the client's properties; at most once.
    pub(crate) fn properties(self, properties: &[(&str, &str)]) -> Self {
        self.table("properties", properties)
    }

    /// Adds the files of the client's secrets; at most once.
    pub(crate) fn secrets(self, files: &[(&str, &str)]) -> Self {
        self.table("secret_files", files)
    }

    fn table(mut self, name: &str, entries: &[(&str, &str)]) -> Self {
        let lines: String = entries.iter().map(|(key, value)| format!("{key:?} = {value:?}\n")).collect();
        self.tables += &format!("[ingest.kafka.{name}]\n{lines}");
        self
    }

    /// Writes the config of a member whose tables lie in `folder`, and returns its path.
    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let Member { brokers, topic, settings, tables } = self;
        let path = folder.join(format!("{topic}.toml"));
        let state = folder.join("state");
        let text = format!(
            "[state]\ndir = {state:?}\n[ingest]\nbatch_bytes = 1048576\ncommit_interval_s = 1\nend_interval_s = 1\n\
             idle_s = 1\n[ingest.kafka]\nbrokers = {brokers:?}\ntopic = {topic:?}\ngroup = \"taod-{topic}\"\n\
             {settings}{tables}"
        );
        std::fs::write(&path, text).unwrap();
        path
    }
}

/// A `taod ingest` that runs until it is killed, which dropping it does.
pub(crate) struct Instance {
    child: Child,
    log: PathBuf,
}

impl Instance {
    /// Starts one; what it logs goes to a file beside its config.
    pub(crate) fn start(config: &Path, name: &str) -> Self {
        let log = config.with_file_name(format!("{name}.log"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.args(["ingest", "--log", "info,taod::ingest=debug", "--config"]).arg(config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(std::fs::File::create(&log).unwrap());
        Instance { child: command.spawn().unwrap(), log }
    }

    /// Returns how many lines of its log hold all of these words.
    pub(crate) fn said(&self, words: &[&str]) -> usize {
        let holds_all = |line: &&str| words.iter().all(|word| line.contains(word));
        self.log().lines().filter(holds_all).count()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Tells it to stop, and waits until it has.
    pub(crate) fn stop(&mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success(), "{}", self.log());
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so().await {
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Returns a table of a member whose config lies in `folder`.
pub(crate) async fn table(folder: &Path, name: Name) -> Table {
    Tables::open(&folder.join("state/tables")).unwrap().open_one(name).await.unwrap()
}

/// Returns how often each record is in a table, by partition and offset.
pub(crate) async fn places(folder: &Path, name: Name) -> BTreeMap<(i64, i64), usize> {
    let mut places = BTreeMap::new();
    for row in table(folder, name).await.rows::<Value>(None).await.unwrap() {
        let number = |key: &str| row[key].as_i64().unwrap();
        *places.entry((number("partition"), number("offset"))).or_default() += 1;
    }
    places
}

/// Returns each of these offsets of the first `partitions` once, as [`places`] returns them.
pub(crate) fn once_each(partitions: i64, offsets: std::ops::Range<i64>) -> BTreeMap<(i64, i64), usize> {
    (0..partitions).flat_map(|partition| offsets.clone().map(move |offset| ((partition, offset), 1))).collect()
}

/// Returns a call as an endpoint logs it.
pub(crate) fn call(text: &str) -> String {
    json!({
        "request": { "model": "m", "messages": [{ "role": "user", "content": text }] },
        "response": { "id": "r", "object": "chat.completion", "model": "m", "choices": [
            { "index": 0, "message": { "role": "assistant", "content": "fine" }, "finish_reason": "stop" } ] },
    })
    .to_string()
}
