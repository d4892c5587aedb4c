//! A site as production has one: the state of a real night, a real endpoint, and the real daemon beside it with its page.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::night::{Night, calls, model};
use super::taod_in;

/// A process that ends with the test.
pub(crate) struct Running(Child);

impl Running {
    /// Starts a program that says what it does to a file.
    pub(crate) fn start(command: &mut Command, log: &Path) -> Running {
        let log = std::fs::File::create(log).unwrap();
        Running(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Returns a port that is free now.
pub(crate) fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until something listens at a port of this machine; a process that does not get there is shown by its log.
pub(crate) fn wait_for(port: u16, log: &Path) {
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        let said = || std::fs::read_to_string(log).unwrap();
        assert!(started.elapsed() < Duration::from_secs(60), "nothing listens at port {port}:\n{}", said());
        std::thread::yield_now();
    }
}

/// A night that was had, its endpoint and its daemon.
pub(crate) struct Site {
    pub(crate) night: Night,
    /// Where the daemon's page is.
    pub(crate) page: u16,
    _daemon: Running,
    _endpoint: Running,
}

impl Site {
    /// Has a night and starts the rest. No broker is there, so that the page has something to complain of.
    pub(crate) fn open() -> Site {
        let night = Night::new(&calls(160));
        let (page, endpoint) = (port(), port());
        let folder = night.config().parent().unwrap().to_path_buf();
        let more = format!(
            "\n[admin]\nlisten = \"127.0.0.1:{page}\"\ntoken_file = {tokens:?}\n\n\
             [serve]\naddress = \"127.0.0.1:{endpoint}\"\nbase_model = \"base\"\nadapter_root = {adapters:?}\n\n\
             [endpoint]\nurls = [\"http://127.0.0.1:{endpoint}\"]\n\n[endpoint.proof]\ntolerance = 0.0001\nmin_prompts = 1\n\n\
             [schedule]\ncron = \"0 0 1 1 *\"\n",
            tokens = folder.join("tokens.json"),
            adapters = night.state().join("registry/adapters"),
        );
        let config = std::fs::read_to_string(night.config()).unwrap();
        let config = config.replacen("\n[[workload]]", &format!("{more}\n[[workload]]"), 1);
        std::fs::write(night.config(), config).unwrap();
        night.worker(&[], &[]);
        let start = |arguments: &[&str], log: &str| {
            let inherited = std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("TAOD_"));
            let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
            command.args(arguments).arg("--config").arg(night.config()).env_clear().envs(inherited);
            Running::start(&mut command, &folder.join(log))
        };
        let endpoint_runs = start(&["serve", "--model", &model().display().to_string()], "serve.log");
        wait_for(endpoint, &folder.join("serve.log"));
        let daemon = start(&["run"], "run.log");
        wait_for(page, &folder.join("run.log"));
        Site { night, page, _daemon: daemon, _endpoint: endpoint_runs }
    }

    /// Returns the folder with the config and the logs.
    pub(crate) fn folder(&self) -> PathBuf {
        self.night.config().parent().unwrap().to_path_buf()
    }

    /// Makes a token for the page.
    pub(crate) fn token(&self, name: &str, role: &str) -> String {
        let config = self.night.config().display().to_string();
        let made = taod_in(&self.folder(), &["admin", "token", name, "--role", role, "--config", &config], &[]);
        made.code(0).out.trim().to_string()
    }

    /// Returns what the daemon said.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.folder().join("run.log")).unwrap()
    }
}
