//! What an operator says about the Kafka topic, and the client properties that follow from it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::query_log::{SourceError, TopicPartition};

/// Where a topic is read from when it is first seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// From the oldest record that Kafka still holds.
    Earliest,
    /// Only what is logged from now on.
    Latest,
}

/// The query log in Kafka.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Bootstrap servers, `host:port`, comma-separated.
    pub brokers: String,
    /// The topic that holds the query log, or a regular expression that begins with `^`: all topics that it matches, also
    /// those that come later.
    pub topic: String,
    /// Consumer group. Daemons that share it share the partitions.
    pub group: String,
    /// Name of this log in the tables' offsets. Two logs in one table need two names.
    pub name: String,
    /// Raise it to read the topic anew, from `start`: rows already stored are then stored again. Range 0 and up.
    pub generation: u32,
    /// Where to begin when the topic is seen for the first time: `earliest` or `latest`.
    pub start: Start,
    /// Memory for records fetched but not yet read, in MiB. Range 1 to 2048.
    pub fetch_mib: u32,
    /// How long to look for the broker and the topic, in seconds. Range 1 to 300.
    pub connect_timeout_s: u64,
    /// How long a rebalance waits until what was read is stored, in seconds. Range 1 to 240, below
    /// `max.poll.interval.ms` (300 s unless set under `properties`).
    pub rebalance_timeout_s: u64,
    /// More librdkafka properties, by name, such as `security.protocol`. With `group.protocol = "consumer"` the broker decides
    /// the session time-out, the heartbeat and the assignment.
    pub properties: BTreeMap<String, String>,
    /// librdkafka properties whose values are read from files, such as `sasl.password`.
    pub secret_files: BTreeMap<String, PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            brokers: "127.0.0.1:9092".into(),
            topic: "llm-queries".into(),
            group: "taod".into(),
            name: "kafka".into(),
            generation: 0,
            start: Start::Earliest,
            fetch_mib: 64,
            connect_timeout_s: 15,
            rebalance_timeout_s: 60,
            properties: BTreeMap::new(),
            secret_files: BTreeMap::new(),
        }
    }
}

/// Properties that the exactly-once protocol or another setting decides.
const OWN: [&str; 7] = [
    "bootstrap.servers",
    "group.id",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "auto.offset.reset",
    "enable.partition.eof",
    "queued.max.messages.kbytes",
];

/// Properties that the group protocol `consumer` (KIP-848) does not know, and what to do instead.
const CLASSIC: [(&str, &str); 4] = [
    ("session.timeout.ms", "the broker decides it (group.consumer.session.timeout.ms)"),
    ("heartbeat.interval.ms", "the broker decides it (group.consumer.heartbeat.interval.ms)"),
    ("partition.assignment.strategy", "set group.remote.assignor, or leave it to the broker"),
    ("group.protocol.type", "there is only one"),
];

/// Librdkafka's own `max.poll.interval.ms`.
const POLL_INTERVAL_MS: u64 = 300_000;

impl Settings {
    /// Checks ranges and properties.
    pub fn validate(&self) -> Result<(), String> {
        for (key, value) in
            [("brokers", &self.brokers), ("topic", &self.topic), ("group", &self.group), ("name", &self.name)]
        {
            if value.is_empty() || value.contains(|c: char| c == '/' || c.is_whitespace()) {
                return Err(format!("{key} is {value:?}: give a name without slashes and spaces"));
            }
        }
        if let Some(Err(error)) = self.pattern() {
            return Err(format!("topic is {:?}, which is no regular expression: {error}", self.topic));
        }
        if let Some(part) = self.is_pattern().then(|| unlike(&self.topic)).flatten() {
            return Err(format!(
                "topic is {:?}, of which taod, kafka's client and its brokers do not read {part:?} alike: write it as a \
                 POSIX extended expression, such as [0-9] for \\d and (a|b) for (?:a|b)",
                self.topic
            ));
        }
        in_range("fetch_mib", u64::from(self.fetch_mib), 1, 2048)?;
        in_range("connect_timeout_s", self.connect_timeout_s, 1, 300)?;
        in_range("rebalance_timeout_s", self.rebalance_timeout_s, 1, 240)?;
        for key in self.properties.keys().chain(self.secret_files.keys()) {
            if OWN.contains(&key.as_str()) {
                return Err(format!("properties.{key} cannot be set: taod decides it; leave it out"));
            }
        }
        if let Some(key) = self.properties.keys().find(|key| is_secret(key)) {
            return Err(format!("properties.{key} is a secret: put it in a file and name the file in secret_files"));
        }
        self.check_known()?;
        self.check_group()
    }

    /// Checks that librdkafka knows the properties, each by itself.
    fn check_known(&self) -> Result<(), String> {
        let mut config = ClientConfig::new();
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        // What stands in the files is not looked at: they may be on another machine.
        for key in self.secret_files.keys() {
            config.set(key, "secret");
        }
        match config.create_native_config() {
            Err(KafkaError::ClientConfig(_, why, key, _)) => {
                let table = if self.properties.contains_key(&key) { "properties" } else { "secret_files" };
                Err(format!("{table}.{key} is refused by kafka's client ({why}): correct it or leave it out"))
            }
            Err(other) => Err(format!("properties are refused by kafka's client: {other}")),
            Ok(_) => Ok(()),
        }
    }

    /// Checks what the properties say about the membership of the group.
    fn check_group(&self) -> Result<(), String> {
        let set = |key: &str| self.properties.contains_key(key);
        match self.is_classic() {
            false => {
                if let Some((key, remedy)) = CLASSIC.into_iter().find(|(key, _)| set(key)) {
                    return Err(format!(
                        "properties.{key} is not supported with group.protocol = \"consumer\": leave it out; {remedy}"
                    ));
                }
            }
            true if set("group.remote.assignor") => {
                return Err("properties.group.remote.assignor needs group.protocol = \"consumer\": set it, too".into());
            }
            true => {}
        }
        let interval = self.properties.get("max.poll.interval.ms").and_then(|ms| ms.parse().ok());
        match interval.unwrap_or(POLL_INTERVAL_MS) {
            ms if self.rebalance_timeout_s * 1000 >= ms => Err(format!(
                "rebalance_timeout_s is {}: choose less than properties.max.poll.interval.ms, which is {ms}",
                self.rebalance_timeout_s
            )),
            _ => Ok(()),
        }
    }

    /// Returns true under the group protocol of old, where the members hold the time-outs and share the partitions out.
    fn is_classic(&self) -> bool {
        !self.properties.get("group.protocol").is_some_and(|protocol| protocol.eq_ignore_ascii_case("consumer"))
    }

    /// Returns the expression for the topics, where the setting is one.
    fn pattern(&self) -> Option<Result<Regex, regex::Error>> {
        self.is_pattern().then(|| Regex::new(&self.topic))
    }

    /// Returns true where the setting names topics by an expression.
    pub(super) fn is_pattern(&self) -> bool {
        self.topic.starts_with('^')
    }

    /// Returns true for a topic that is read.
    pub fn reads(&self, topic: &str) -> bool {
        self.chooser()(topic)
    }

    /// Returns what is true for topics that are read. For many of them: an expression is compiled once.
    pub fn chooser(&self) -> impl Fn(&str) -> bool {
        let pattern = self.pattern();
        move |topic| match &pattern {
            None => topic == self.topic,
            // Kafka's own topics are nobody's log.
            Some(Ok(pattern)) => !topic.starts_with("__") && pattern.is_match(topic),
            Some(Err(_)) => false,
        }
    }

    /// Returns what is subscribed to. The client looks for an expression in a name, a broker (KIP-848) compares whole names.
    pub(super) fn subscription(&self) -> String {
        match self.is_pattern() && !self.is_classic() {
            true => format!("^.*({}).*", self.topic),
            false => self.topic.clone(),
        }
    }

    /// Returns the name under which the offset of a partition is stored.
    pub fn app_id(&self, place: &TopicPartition) -> String {
        format!("taod/{}/{}/{}/{}", self.name, self.generation, place.topic, place.partition)
    }

    /// Returns the name under which the id that Kafka gave to a topic is stored.
    pub fn topic_id(&self, topic: &str) -> String {
        format!("taod/{}/{}/{topic}/topic-id", self.name, self.generation)
    }

    /// Returns the app id that counts the replays of a topic's dead letters.
    pub fn replay_id(&self, topic: &str) -> String {
        format!("taod/{}/{}/replay/{topic}", self.name, self.generation)
    }

    /// Returns the client's properties: taod's defaults, then the operator's, then what the protocol needs.
    pub(super) fn client(&self) -> Result<ClientConfig, SourceError> {
        let mut config = ClientConfig::new();
        let defaults = [
            ("client.id", "taod"),
            ("statistics.interval.ms", "5000"),
            // librdkafka stops fetching for a whole second when its queue is full; a fast reader then waits idle.
            ("fetch.queue.backoff.ms", "10"),
            ("fetch.wait.max.ms", "100"),
            ("topic.metadata.refresh.interval.ms", "60000"),
        ];
        for (key, value) in defaults {
            config.set(key, value);
        }
        if self.is_classic() {
            config.set("session.timeout.ms", "10000");
        }
        for (key, value) in &self.properties {
            config.set(key, value);
        }
        for (key, path) in &self.secret_files {
            let fail = |e: std::io::Error| SourceError::Secret {
                key: key.clone(),
                path: path.display().to_string(),
                why: e.to_string(),
            };
            config.set(key, std::fs::read_to_string(path).map_err(fail)?.trim_end());
        }
        config
            .set("bootstrap.servers", &self.brokers)
            .set("group.id", &self.group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error")
            .set("enable.partition.eof", "true")
            .set("queued.max.messages.kbytes", (u64::from(self.fetch_mib) << 10).to_string());
        if self.is_pattern() {
            // Whatever the expression: Kafka's own topics are nobody's log.
            let more = self.properties.get("topic.blacklist").map_or(String::new(), |own| format!("{own},"));
            config.set("topic.blacklist", format!("{more}^__"));
        }
        Ok(config)
    }
}

fn in_range(key: &str, value: u64, low: u64, high: u64) -> Result<(), String> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(format!("{key} is {value}: choose {low} to {high}")),
    }
}

/// Returns what the three readers of an expression do not read alike: Rust's, POSIX's in the client and RE2's in a broker.
fn unlike(expression: &str) -> Option<String> {
    let pairs = expression.chars().zip(expression.chars().skip(1));
    let mut escaped = false;
    for (first, second) in pairs {
        let escapes = first == '\\' && !escaped;
        if (escapes && second.is_alphanumeric()) || (first == '(' && second == '?' && !escaped) {
            return Some([first, second].iter().collect());
        }
        escaped = escapes;
    }
    None
}

fn is_secret(key: &str) -> bool {
    ["password", "passphrase", "secret"].iter().any(|word| key.contains(word)) || key.ends_with("key.pem")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_are_valid_and_what_taod_decides_is_not_up_for_change() {
        let mut settings = Settings::default();
        settings.validate().unwrap();
        settings.properties.insert("enable.auto.commit".into(), "true".into());
        assert!(settings.validate().unwrap_err().contains("properties.enable.auto.commit"));
    }

    #[test]
    fn a_secret_stands_in_a_file_never_in_the_settings() {
        let mut settings = Settings::default();
        settings.properties.insert("sasl.password".into(), "hunter2".into());
        let refusal = settings.validate().unwrap_err();
        assert!(refusal.contains("secret_files") && !refusal.contains("hunter2"), "{refusal}");
        settings.properties.clear();
        settings.secret_files.insert("sasl.password".into(), "/no/such/file".into());
        settings.validate().unwrap();
        let error = settings.client().err().unwrap().to_string();
        assert!(error.contains("/no/such/file") && error.contains("sasl.password"), "{error}");
    }

    fn with(properties: &[(&str, &str)]) -> Settings {
        let properties = properties.iter().map(|(key, value)| (key.to_string(), value.to_string()));
        Settings { properties: properties.collect(), ..Settings::default() }
    }

    #[test]
    fn any_property_of_the_client_passes_and_another_is_named() {
        let settings = with(&[("socket.keepalive.enable", "true"), ("client.rack", "a"), ("client.id", "mine")]);
        settings.validate().unwrap();
        let client = settings.client().unwrap();
        assert_eq!(client.get("client.rack"), Some("a"));
        assert_eq!(client.get("client.id"), Some("mine"), "before the default");
        let refusal = with(&[("sesion.timeout.ms", "1")]).validate().unwrap_err();
        assert!(refusal.contains("properties.sesion.timeout.ms") && refusal.contains("No such"), "{refusal}");
        let refusal = with(&[("session.timeout.ms", "soon")]).validate().unwrap_err();
        assert!(refusal.contains("properties.session.timeout.ms"), "{refusal}");
        let mut settings = Settings::default();
        settings.secret_files.insert("sasl.pasword".into(), "/no/such/file".into());
        let refusal = settings.validate().unwrap_err();
        assert!(refusal.contains("secret_files.sasl.pasword"), "{refusal}");
    }

    #[test]
    fn what_the_new_group_protocol_does_not_know_is_named() {
        let protocol = ("group.protocol", "consumer");
        let settings = with(&[protocol, ("group.instance.id", "a"), ("group.remote.assignor", "uniform")]);
        settings.validate().unwrap();
        assert_eq!(settings.client().unwrap().get("session.timeout.ms"), None);
        assert_eq!(Settings::default().client().unwrap().get("session.timeout.ms"), Some("10000"));
        for (key, value) in [
            ("session.timeout.ms", "10000"),
            ("heartbeat.interval.ms", "3000"),
            ("partition.assignment.strategy", "range"),
            ("group.protocol.type", "consumer"),
        ] {
            with(&[(key, value)]).validate().unwrap();
            let refusal = with(&[protocol, (key, value)]).validate().unwrap_err();
            assert!(refusal.contains(&format!("properties.{key} is not supported")), "{refusal}");
            // The list is librdkafka's own.
            let client = with(&[protocol, (key, value)]).client().unwrap();
            let error = client.create::<rdkafka::consumer::BaseConsumer>().err().unwrap().to_string();
            assert!(error.contains(key) && error.contains("not supported"), "{error}");
        }
        assert!(with(&[("group.remote.assignor", "uniform")]).validate().is_err());
    }

    #[test]
    fn a_rebalance_ends_before_the_broker_gives_the_member_up() {
        let mut settings = with(&[("max.poll.interval.ms", "60000")]);
        let refusal = settings.validate().unwrap_err();
        assert!(refusal.contains("rebalance_timeout_s is 60") && refusal.contains("60000"), "{refusal}");
        settings.rebalance_timeout_s = 59;
        settings.validate().unwrap();
    }

    #[test]
    fn a_pattern_reads_what_it_matches_and_a_name_itself_alone() {
        let settings = |topic: &str| Settings { topic: topic.into(), ..Settings::default() };
        let reads = |topic: &str, asked: &str| settings(topic).reads(asked);
        assert!(reads("llm", "llm") && !reads("llm", "llm-2"));
        assert!(reads("^llm", "llm-2") && !reads("^llm", "my-llm") && !reads("^.*", "__consumer_offsets"));
        settings("^llm-(a|b)$").validate().unwrap();
        for (topic, part) in [("^llm-\\d", "\\d"), ("^(?:a|b)", "(?"), ("^(?i)a", "(?"), ("^a\\\\\\w", "\\w")] {
            let refusal = settings(topic).validate().unwrap_err();
            assert!(refusal.contains(&format!("do not read {part:?} alike")), "{refusal}");
        }
        for topic in ["^llm\\.a", "^a\\\\d", "^\\(?"] {
            settings(topic).validate().unwrap();
        }
        assert!(settings("^(").validate().unwrap_err().contains("topic is \"^(\""));
    }

    #[test]
    fn an_expression_finds_the_same_topics_under_both_group_protocols() {
        let settings = |properties: &[(&str, &str)]| Settings { topic: "^llm-|^chat".into(), ..with(properties) };
        let classic = settings(&[("topic.blacklist", "^llm-x")]);
        assert_eq!(classic.subscription(), "^llm-|^chat");
        assert_eq!(classic.client().unwrap().get("topic.blacklist"), Some("^llm-x,^__"));
        let new = settings(&[("group.protocol", "consumer")]);
        // A broker compares whole names.
        let whole = Regex::new(&format!("^(?:{})$", new.subscription())).unwrap();
        for topic in ["llm-a", "chat", "chat-2", "my-llm-a", "ll"] {
            assert_eq!(whole.is_match(topic), new.reads(topic), "{topic}");
        }
        assert_eq!(Settings::default().client().unwrap().get("topic.blacklist"), None);
        assert_eq!(with(&[("group.protocol", "consumer")]).subscription(), Settings::default().topic);
    }

    #[test]
    fn the_offset_of_a_partition_has_its_own_name_per_generation() {
        let settings = Settings { generation: 2, ..Settings::default() };
        assert_eq!(settings.app_id(&TopicPartition::new("llm-queries", 3)), "taod/kafka/2/llm-queries/3");
    }
}
