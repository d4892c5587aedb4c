//! The page where other machines can reach it: TLS, a token or a client's certificate, and the names it goes by.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use taod::admin::actions::Actions;
use taod::admin::facts::Facts;
use taod::admin::token::{Role, Tokens};
use taod::admin::{Settings, State, bind, spawn};
use taod::config::Config;
use taod::health::Health;
use taod::metrics::Metrics;

use crate::harness::has;

/// An authority with a certificate for the page and one for a client, made by openssl.
struct Keys(tempfile::TempDir);

impl Keys {
    /// Returns nothing where there is no openssl.
    fn make() -> Option<Keys> {
        let there = Command::new("openssl").arg("version").output().is_ok();
        if !has("openssl", there, "run tools/setup.sh test") {
            return None;
        }
        let keys = Keys(tempfile::tempdir().unwrap());
        for authority in ["ca", "other"] {
            keys.run(&format!(
                "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={authority} \
                -addext basicConstraints=critical,CA:TRUE -keyout {authority}.key -out {authority}.pem"
            ));
        }
        std::fs::write(keys.0.path().join("page.ext"), "subjectAltName=DNS:taod.test\n").unwrap();
        std::fs::write(keys.0.path().join("client.ext"), "extendedKeyUsage=clientAuth\n").unwrap();
        for (name, authority, extension) in
            [("page", "ca", "page"), ("client", "ca", "client"), ("stranger", "other", "client")]
        {
            keys.run(&format!("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"));
            keys.run(&format!("x509 -req -days 2 -in {name}.csr -CA {authority}.pem -CAkey {authority}.key -extfile {extension}.ext -out {name}.pem"));
        }
        Some(keys)
    }

    fn run(&self, arguments: &str) {
        let output =
            Command::new("openssl").args(arguments.split_whitespace()).current_dir(self.0.path()).output().unwrap();
        assert!(output.status.success(), "openssl {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn settings(&self) -> Settings {
        Settings {
            listen: "0.0.0.0:0".into(),
            hosts: vec!["taod.test".into()],
            tls_certificate_file: self.path("page.pem"),
            tls_key_file: self.path("page.key"),
            token_file: self.path("tokens.json"),
            ..Settings::default()
        }
    }

    /// A client that finds the page by its name, with a certificate where `identity` names one.
    fn client(&self, address: SocketAddr, identity: Option<&str>) -> reqwest::Client {
        let read = |name: &str| std::fs::read(self.path(name)).unwrap();
        let mut client = reqwest::Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .add_root_certificate(reqwest::Certificate::from_pem(&read("ca.pem")).unwrap())
            .resolve("taod.test", SocketAddr::from(([127, 0, 0, 1], address.port())));
        if let Some(name) = identity {
            let pem = [read(&format!("{name}.pem")), read(&format!("{name}.key"))].concat();
            client = client.identity(reqwest::Identity::from_pem(&pem).unwrap());
        }
        client.build().unwrap()
    }
}

fn with_page(settings: &Settings, work: impl AsyncFnOnce(SocketAddr)) {
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.state.dir = folder.path().to_path_buf();
    let (metrics, health) = (Arc::new(Metrics::new().unwrap()), Arc::new(Health::default()));
    let facts = Arc::new(Facts::new(Arc::new(config), metrics, health).unwrap());
    let state = State { facts, actions: Arc::new(Actions::none(folder.path())) };
    let bound = bind(settings).unwrap();
    let address = bound.address().unwrap();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let page = spawn(bound, state, async { drop(stopped.await) }).unwrap();
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work(address));
    stop.send(()).unwrap();
    page.join().unwrap().unwrap();
}

async fn status(request: reqwest::RequestBuilder) -> u16 {
    request.send().await.unwrap().status().as_u16()
}

#[test]
fn off_loopback_everything_but_the_way_in_needs_a_token_over_tls() {
    let Some(keys) = Keys::make() else { return };
    let settings = keys.settings();
    let token = Tokens::at(&settings.token_file).make("anna", Role::Read, chrono::Utc::now()).unwrap();
    with_page(&settings, async |address| {
        let client = keys.client(address, None);
        let url = |path: &str| format!("https://taod.test:{}{path}", address.port());
        for path in ["/metrics", "/readyz", "/api/v1/status", "/api/v1/current"] {
            assert_eq!(status(client.get(url(path))).await, 401, "{path}");
            assert_eq!(status(client.get(url(path)).bearer_auth("taod_guess")).await, 401, "{path}");
        }
        let seen = client.get(url("/metrics")).bearer_auth(token.expose()).send().await.unwrap();
        assert_eq!(seen.status(), 200);
        assert!(seen.headers().contains_key("strict-transport-security"));
        assert_eq!(status(client.get(url("/healthz"))).await, 200);
        let rebound = client.get(url("/metrics")).bearer_auth(token.expose()).header("host", "evil.example");
        assert_eq!(status(rebound).await, 403);
        let plain = reqwest::Client::builder().no_proxy().build().unwrap();
        let answer =
            plain.get(format!("http://127.0.0.1:{}/metrics", address.port())).bearer_auth(token.expose()).send().await;
        assert!(answer.is_err(), "answered without TLS");
    });
}

#[test]
fn a_client_is_let_in_by_its_authority_and_a_stranger_is_not() {
    let Some(keys) = Keys::make() else { return };
    let settings = Settings { client_ca_file: keys.path("ca.pem"), token_file: PathBuf::new(), ..keys.settings() };
    with_page(&settings, async |address| {
        let url = format!("https://taod.test:{}/metrics", address.port());
        assert_eq!(status(keys.client(address, Some("client")).get(&url)).await, 200);
        for identity in [None, Some("stranger")] {
            assert!(keys.client(address, identity).get(&url).send().await.is_err(), "{identity:?} was let in");
        }
    });
}

#[test]
fn keys_that_cannot_be_used_are_named() {
    use std::os::unix::fs::PermissionsExt;
    let Some(keys) = Keys::make() else { return };
    let refused = |settings: Settings| bind(&settings).err().expect("bound");
    let missing = refused(Settings { tls_certificate_file: keys.path("none.pem"), ..keys.settings() });
    assert!(missing.starts_with("admin.tls_certificate_file ") && missing.contains("none.pem"), "{missing}");
    let other = refused(Settings { tls_key_file: keys.path("client.key"), ..keys.settings() });
    assert!(other.contains("tls_key_file"), "{other}");
    let swapped = refused(Settings { tls_key_file: keys.path("page.pem"), ..keys.settings() });
    assert!(swapped.starts_with("admin.tls_key_file "), "{swapped}");
    set_mode(&keys.path("page.key"), 0o644);
    let open = refused(keys.settings());
    assert!(open.contains("can be read by every user"), "{open}");
    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }
}
