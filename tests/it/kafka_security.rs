//! Brokers that ask who is there: every way in that taod has, and one line for each way of being kept out.

mod tokens;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use taod::table::Name;

use self::tokens::Tokens;
use crate::harness::kafka::{Instance, Kafka, Member, once_each, places, until};
use crate::harness::{root, taod_in};

const TOPIC: &str = "secured";
const PARTITIONS: i32 = 2;
const CALLS: usize = 50;
const MODULES: &str = "org.apache.kafka.common.security";

/// A broker that lets in the user `taod` to everything and the user `stranger` to nothing, with a listener for each way.
struct Secured {
    kafka: Kafka,
    folder: tempfile::TempDir,
    port: u16,
    tokens: Tokens,
}

impl Secured {
    fn start() -> Option<Self> {
        let port = Kafka::port(5)?;
        let folder = tempfile::tempdir().unwrap();
        let made = Command::new(root().join("tests/kafka/certs.sh")).arg(folder.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let tokens = Tokens::start(&folder.path().join("token.key"));
        let keys = folder.path().join("jwks.json");
        std::fs::write(&keys, tokens.keys()).unwrap();
        let keys = format!("file://{}", keys.display());
        let more = properties(port, folder.path(), &keys);
        let more: Vec<&str> = more.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        let environment = [
            ("JAVA_TOOL_OPTIONS", format!("-Dorg.apache.kafka.sasl.oauthbearer.allowed.urls={keys}")),
            (
                "FORMAT",
                "--add-scram SCRAM-SHA-512=[name=taod,password=right] \
                 --add-scram SCRAM-SHA-512=[name=stranger,password=right]"
                    .to_owned(),
            ),
        ];
        let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
        let kafka = Kafka::start_at(port, &more, &environment)?;
        Some(Secured { kafka, folder, port, tokens })
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// Writes a secret into a file and returns its path.
    fn secret(&self, name: &str, value: &str) -> String {
        std::fs::write(self.folder.path().join(name), format!("{value}\n")).unwrap();
        self.file(name)
    }

    /// Returns the settings of a member that comes in at a listener.
    fn member(&self, listener: Listener, properties: &[(&str, &str)], secrets: &[(&str, &str)]) -> Member {
        let mut member = self.kafka.member(TOPIC);
        member.brokers = format!("127.0.0.1:{}", self.port + listener as u16);
        member.properties(properties).secrets(secrets)
    }

    /// Returns the settings of a member that names itself by SASL.
    fn sasl(&self, mechanism: &str, user: &str, authority: &str, password: &str) -> Member {
        let properties = [
            ("security.protocol", "SASL_SSL"),
            ("ssl.ca.location", &self.file(authority)),
            ("sasl.mechanism", mechanism),
            ("sasl.username", user),
        ];
        self.member(Listener::Sasl, &properties, &[("sasl.password", password)])
    }

    /// Returns the settings of a member that asks the token endpoint for a token.
    fn oidc(&self, endpoint: &str, audience: &str, secret: &str) -> Member {
        let properties = [
            ("security.protocol", "SASL_SSL"),
            ("ssl.ca.location", &self.file("ca.pem")),
            ("sasl.mechanism", "OAUTHBEARER"),
            ("sasl.oauthbearer.method", "oidc"),
            ("sasl.oauthbearer.client.id", "taod"),
            ("sasl.oauthbearer.scope", audience),
            ("sasl.oauthbearer.token.endpoint.url", endpoint),
        ];
        self.member(Listener::Sasl, &properties, &[("sasl.oauthbearer.client.secret", secret)])
    }

    /// Returns the settings of a member that shows a certificate, or none.
    fn tls(&self, listener: Listener, authority: &str, certificate: Option<&str>) -> Member {
        let authority = self.file(authority);
        let mut properties = vec![("security.protocol", "SSL"), ("ssl.ca.location", &authority)];
        let Some(name) = certificate else { return self.member(listener, &properties, &[]) };
        let shown = self.file(&format!("{name}.pem"));
        properties.push(("ssl.certificate.location", &shown));
        // The file that holds a key is named, and the key itself given as a secret: both ways work.
        match name {
            "client" => self.member(listener, &properties, &[("ssl.key.pem", &self.file("client.key"))]),
            _ => {
                let key = self.file(&format!("{name}.key"));
                properties.push(("ssl.key.location", &key));
                self.member(listener, &properties, &[])
            }
        }
    }
}

/// The listeners, by the distance of their ports from the first.
#[derive(Clone, Copy)]
enum Listener {
    Sasl = 2,
    ClientCertificate = 3,
    Expired = 4,
}

fn properties(port: u16, folder: &Path, keys: &str) -> String {
    let [control, sasl, mtls, expired] = [1, 2, 3, 4].map(|offset| port + offset);
    let folder = folder.display();
    format!(
        r#"
        listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{control},SASL://127.0.0.1:{sasl},MTLS://127.0.0.1:{mtls},EXPIRED://127.0.0.1:{expired}
        listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL:SASL_SSL,MTLS:SSL,EXPIRED:SSL
        ssl.keystore.type=PEM
        ssl.keystore.location={folder}/broker.pem
        ssl.truststore.type=PEM
        ssl.truststore.location={folder}/ca.pem
        listener.name.mtls.ssl.client.auth=required
        listener.name.expired.ssl.keystore.type=PEM
        listener.name.expired.ssl.keystore.location={folder}/expired.pem
        listener.name.sasl.sasl.enabled.mechanisms=SCRAM-SHA-512,PLAIN,OAUTHBEARER
        listener.name.sasl.scram-sha-512.sasl.jaas.config={MODULES}.scram.ScramLoginModule required;
        listener.name.sasl.plain.sasl.jaas.config={MODULES}.plain.PlainLoginModule required user_taod="right";
        listener.name.sasl.oauthbearer.sasl.jaas.config={MODULES}.oauthbearer.OAuthBearerLoginModule required;
        listener.name.sasl.oauthbearer.sasl.server.callback.handler.class={MODULES}.oauthbearer.OAuthBearerValidatorCallbackHandler
        listener.name.sasl.oauthbearer.sasl.oauthbearer.jwks.endpoint.url={keys}
        listener.name.sasl.oauthbearer.sasl.oauthbearer.expected.audience=kafka
        listener.name.sasl.oauthbearer.sasl.oauthbearer.expected.issuer={issuer}
        authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
        super.users=User:ANONYMOUS;User:taod;User:CN=taod
        "#,
        issuer = tokens::ISSUER,
    )
}

fn ingest(config: &Path) -> crate::harness::Outcome {
    taod_in(config.parent().unwrap(), &["ingest", "--until-idle", "--config", &config.display().to_string()], &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn every_way_in_reads_every_row_and_every_refusal_is_one_line() {
    let Some(secured) = Secured::start() else { return };
    secured.kafka.create_topic(TOPIC, PARTITIONS).await;
    secured.kafka.send_calls(TOPIC, PARTITIONS, CALLS);
    every_way_in_reads_every_row(&secured).await;
    every_refusal_is_one_line_within_10_seconds(&secured);
    a_secret_that_is_corrected_is_read_again(&secured).await;
}

async fn every_way_in_reads_every_row(secured: &Secured) {
    let right = secured.secret("right", "right");
    let ways = [
        ("scram", secured.sasl("SCRAM-SHA-512", "taod", "ca.pem", &right)),
        ("plain", secured.sasl("PLAIN", "taod", "ca.pem", &right)),
        ("mtls", secured.tls(Listener::ClientCertificate, "ca.pem", Some("client"))),
        ("oidc", secured.oidc(&secured.tokens.url(), "kafka", &right)),
    ];
    for (name, member) in ways {
        let folder = tempfile::tempdir().unwrap();
        let outcome = ingest(&member.write(folder.path()));
        assert_eq!(outcome.code, 0, "{name}: {}", outcome.err);
        assert!(places(folder.path(), Name::Queries).await == once_each(PARTITIONS.into(), 0..CALLS as i64), "{name}");
    }
    assert!(secured.tokens.granted() >= 1);
}

/// A case: the settings, and what the line holds.
type Case<'a> = (&'a str, Member, &'a [&'a str]);

fn every_refusal_is_one_line_within_10_seconds(secured: &Secured) {
    let (right, wrong) = (secured.secret("right", "right"), secured.secret("wrong", "wrong-secret"));
    let mtls = |certificate| secured.tls(Listener::ClientCertificate, "ca.pem", certificate);
    let (url, dead) = (secured.tokens.url(), "http://127.0.0.1:1/token");
    let not_ours = "ssl.certificate.location";
    let cases: [Case<'_>; 13] = [
        (
            "password",
            secured.sasl("SCRAM-SHA-512", "taod", "ca.pem", &wrong),
            &["invalid credentials", "sasl.password"],
        ),
        ("plain password", secured.sasl("PLAIN", "taod", "ca.pem", &wrong), &["Invalid username", "sasl.password"]),
        ("mechanism", secured.sasl("SCRAM-SHA-256", "taod", "ca.pem", &right), &["SCRAM-SHA-512", "sasl.mechanism"]),
        ("rights", secured.sasl("SCRAM-SHA-512", "stranger", "ca.pem", &right), &["forbids", "allow this user Read"]),
        ("authority", secured.sasl("PLAIN", "taod", "unknown-ca.pem", &right), &["UnknownIssuer", "ssl.ca.location"]),
        ("expired", secured.tls(Listener::Expired, "ca.pem", None), &["certificate expired", "renewed"]),
        ("no certificate", mtls(None), &["alert bad certificate", not_ours]),
        ("a stranger's certificate", mtls(Some("stranger")), &["alert", not_ours]),
        ("an expired certificate", mtls(Some("expired-client")), &["alert certificate", not_ours]),
        ("token refused", secured.oidc(&url, "kafka", &wrong), &["invalid_client", "sasl.oauthbearer.client.secret"]),
        ("no token endpoint", secured.oidc(dead, "kafka", &right), &["connect", "sasl.oauthbearer.token.endpoint.url"]),
        ("token of no use", secured.oidc(&url, "other", &right), &["invalid_token", "audience"]),
        ("plain text", secured.member(Listener::Sasl, &[], &[]), &["security.protocol", "ingest.kafka.brokers"]),
    ];
    std::thread::scope(|scope| {
        for (name, member, parts) in cases {
            scope.spawn(move || {
                let folder = tempfile::tempdir().unwrap();
                let begun = Instant::now();
                // A connection that just breaks is tried until the time-out: it may be a broker that starts.
                let outcome = ingest(&member.setting("connect_timeout_s = 6").write(folder.path()));
                assert!(begun.elapsed() < Duration::from_secs(10), "{name}: {:?}", begun.elapsed());
                assert!(!outcome.err.contains("wrong-secret"), "{name}: {}", outcome.err);
                outcome.refused(parts);
                assert!(!folder.path().join("state/tables/queries").exists(), "{name}: something was made");
            });
        }
    });
}

/// `taod ingest` alone, as the daemon does, goes on once the secret is right.
async fn a_secret_that_is_corrected_is_read_again(secured: &Secured) {
    let password = secured.secret("password", "wrong-secret");
    let folder = tempfile::tempdir().unwrap();
    let config: PathBuf = secured.sasl("SCRAM-SHA-512", "taod", "ca.pem", &password).write(folder.path());
    let mut instance = Instance::start(&config, "corrected");
    until("the broker refused", async || instance.said(&["ERROR", "invalid credentials", "wait_s="]) > 0).await;
    assert!(instance.is_alive());
    secured.secret("password", "right");
    let all = once_each(PARTITIONS.into(), 0..CALLS as i64);
    until("all rows are stored", async || places(folder.path(), Name::Queries).await == all).await;
    assert!(!instance.log().contains("wrong-secret"));
}
