//! The page in Chromium, over the state of a real night, with a real endpoint and the real daemon behind it.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::night::{Night, calls, model};
use crate::harness::{cache, has, root, taod_in};

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start(night: &Night, arguments: &[&str], log: &Path) -> Running {
    let log = std::fs::File::create(log).unwrap();
    let inherited = std::env::vars_os().filter(|(name, _)| !name.to_string_lossy().starts_with("TAOD_"));
    let child = Command::new(env!("CARGO_BIN_EXE_taod"))
        .args(arguments)
        .arg("--config")
        .arg(night.config())
        .env_clear()
        .envs(inherited)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn();
    Running(child.unwrap())
}

/// Returns a port that is free now.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Waits until something listens at a port of this machine; a process that does not get there is shown by its log.
fn wait_for(port: u16, log: &Path) {
    let started = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        let said = || std::fs::read_to_string(log).unwrap();
        assert!(started.elapsed() < Duration::from_secs(60), "nothing listens at port {port}:\n{}", said());
        std::thread::yield_now();
    }
}

/// Returns the folder with playwright-core and axe-core, where this machine has them and Chromium.
fn browser() -> Option<PathBuf> {
    let modules = cache().join("page");
    let runs =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    let there = runs("node") && runs("chromium") && modules.join("node_modules/axe-core").exists();
    has("chromium", there, "run tools/setup.sh page").then_some(modules)
}

#[test]
#[ignore = "three minutes, and a browser"]
fn the_page_works_in_a_browser() {
    let Some(modules) = browser() else { return };
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
    let config = std::fs::read_to_string(night.config()).unwrap().replacen(
        "\n[[workload]]",
        &format!("{more}\n[[workload]]"),
        1,
    );
    std::fs::write(night.config(), config).unwrap();
    night.worker(&[], &[]);
    let shown = night.config().display().to_string();
    let token = |name: &str, role: &str| {
        taod_in(&folder, &["admin", "token", name, "--role", role, "--config", &shown], &[])
            .code(0)
            .out
            .trim()
            .to_string()
    };
    let (operate, read) = (token("olga", "operate"), token("ruth", "read"));
    let _endpoint = start(&night, &["serve", "--model", &model().display().to_string()], &folder.join("serve.log"));
    wait_for(endpoint, &folder.join("serve.log"));
    let _daemon = start(&night, &["run"], &folder.join("run.log"));
    wait_for(page, &folder.join("run.log"));
    let out = std::env::var_os("TAOD_SCREENSHOTS")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| folder.join("screenshots"), PathBuf::from);
    std::fs::create_dir_all(&out).unwrap();
    let status = Command::new("node")
        .arg(root().join("tests/page/page.mjs"))
        .args([format!("http://127.0.0.1:{page}"), operate, read])
        .args([&modules, &out])
        .output()
        .unwrap();
    let log = std::fs::read_to_string(folder.join("run.log")).unwrap();
    assert!(status.status.success(), "{}\nthe daemon said:\n{log}", String::from_utf8_lossy(&status.stderr));
}
