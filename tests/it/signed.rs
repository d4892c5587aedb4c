//! Signatures end to end: by the program's own commands, into a real server.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::harness::night::{model, register_scaled};
use crate::harness::site::{Running, port, wait_for};
use crate::harness::{Outcome, taod_in};

/// A state folder with a key, a server, and a config that trusts the key.
struct Stage {
    folder: tempfile::TempDir,
    port: u16,
    server: Option<Running>,
    /// Where the server reads keys that it trusts; without it, it asks for no signature.
    server_config: Option<PathBuf>,
}

impl Stage {
    fn new() -> Stage {
        let mut stage = Stage { folder: tempfile::tempdir().unwrap(), port: port(), server: None, server_config: None };
        let key = stage.path("key.pem").display().to_string();
        let public = taod_in(stage.folder.path(), &["adapters", "keygen", &key], &[]).code(0).out;
        let config = format!(
            "[state]\ndir = {:?}\n[model]\npath = {:?}\n[registry]\nsigning_key_file = {key:?}\ntrusted_keys = [{:?}]\n\
             [endpoint]\nurls = [\"http://127.0.0.1:{}\"]\nretries = 0\n[endpoint.proof]\ntolerance = 0.002\nmax_tokens = 12\n",
            stage.path("state"),
            model(),
            public.trim(),
            stage.port
        );
        std::fs::write(stage.path("taod.toml"), config).unwrap();
        stage.restart_server();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn restart_server(&mut self) {
        self.server = None;
        let mut command = Command::new(env!("CARGO_BIN_EXE_taod"));
        command.arg("serve").arg("--model").arg(model()).args(["--listen", &format!("127.0.0.1:{}", self.port)]);
        command.env("TAOD__SERVE__ADAPTER_ROOT", self.folder.path()).env("TAOD__SERVE__BASE_MODEL", "base");
        if let Some(config) = &self.server_config {
            command.arg("--config").arg(config);
        }
        let log = self.path("serve.log");
        self.server = Some(Running::start(&mut command, &log));
        wait_for(self.port, &log);
    }

    fn adapters(&self, arguments: &[&str]) -> Outcome {
        let arguments = [&["adapters"], arguments, &["--config", "taod.toml"]].concat();
        taod_in(self.folder.path(), &arguments, &[("USER", "tester")])
    }

    fn register(&self, alpha: u32) -> String {
        register_scaled(self.folder.path(), alpha, |arguments| self.adapters(arguments))
    }

    fn file(&self, version: &str, name: &str) -> PathBuf {
        self.path("state/registry/adapters").join(version).join(name)
    }

    fn loaded(&self) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let url = format!("http://127.0.0.1:{}/v1/models", self.port);
        runtime.block_on(async { reqwest::get(url).await.unwrap().text().await.unwrap() })
    }

    /// Asks the server itself for a version's folder under a name, as anybody who reaches it can.
    fn ask_to_load(&self, name: &str, version: &str) -> (u16, String) {
        let folder = self.path("state/registry/adapters").join(version);
        let body = json!({"lora_name": name, "lora_path": folder, "load_inplace": true});
        let request = reqwest::Client::new().post(format!("http://127.0.0.1:{}/v1/load_lora_adapter", self.port));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let response = request.json(&body).send().await.unwrap();
            (response.status().as_u16(), response.text().await.unwrap())
        })
    }

    fn refuses_to_load(&self, name: &str, version: &str, says: &str) {
        let (status, body) = self.ask_to_load(name, version);
        let message = serde_json::from_str::<Value>(&body).unwrap()["error"]["message"].as_str().unwrap().to_owned();
        assert!(status == 400 && message.contains(says) && !message.contains('\n'), "{status} {message}");
        assert!(!self.loaded().contains(&format!("\"{name}\"")), "{}", self.loaded());
    }
}

/// Exchanges a number in the config of an adapter, and makes manifest and hashes fit, as an attacker would.
fn exchange(config: &Path, manifest: &Path) {
    let old = taod::durable::sha256_file(config).unwrap();
    let text = std::fs::read_to_string(config).unwrap();
    std::fs::write(config, text.replace("\"lora_alpha\":8", "\"lora_alpha\":9")).unwrap();
    let new = taod::durable::sha256_file(config).unwrap();
    assert_ne!(old, new);
    let text = std::fs::read_to_string(manifest).unwrap();
    std::fs::write(manifest, text.replace(&old, &new)).unwrap();
}

#[test]
fn what_was_exchanged_on_disk_reaches_no_server() {
    let mut stage = Stage::new();
    let (first, second) = (stage.register(8), stage.register(32));
    let verified = stage.adapters(&["verify"]).code(0).out;
    assert_eq!(verified.matches("signed by ").count(), 2, "{verified}");
    stage.adapters(&["promote", &first, "--reason", "a test"]).code(0);
    // The served version's signature is lost, and the server with it: it is not put back.
    std::fs::rename(stage.file(&first, "manifest.sig"), stage.path("kept.sig")).unwrap();
    stage.restart_server();
    stage.adapters(&["settle"]).refused(&[&first, "is not signed", "taod adapters sign"]);
    assert!(!stage.loaded().contains(&first));
    std::fs::rename(stage.path("kept.sig"), stage.file(&first, "manifest.sig")).unwrap();
    stage.adapters(&["settle"]).code(0);
    assert!(stage.loaded().contains(&first));
    // Exchanged, with all hashes made to fit.
    exchange(&stage.file(&first, "adapter_config.json"), &stage.file(&first, "manifest.json"));
    stage.restart_server();
    stage.adapters(&["settle"]).refused(&[&first]);
    assert!(!stage.loaded().contains(&first));
    for command in [&["promote", &second, "--reason", "a test"][..], &["verify", &first]] {
        stage.adapters(command).refused(&[&first]);
    }
    assert!(
        !stage.loaded().contains(&second),
        "the change is proven against what is served, which cannot be loaded here either"
    );
    // A key that others may read signs nothing more.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(stage.path("key.pem"), open).unwrap();
    stage.adapters(&["sign", &second]).refused(&["key.pem", "mode 644", "chmod 600"]);
}

#[test]
fn versions_from_before_the_key_are_signed_by_a_command() {
    let stage = Stage::new();
    let with = std::fs::read_to_string(stage.path("taod.toml")).unwrap();
    let without: String =
        with.lines().filter(|line| !line.starts_with("signing_key_file")).map(|l| format!("{l}\n")).collect();
    std::fs::write(stage.path("taod.toml"), without.replace("trusted_keys", "# trusted_keys")).unwrap();
    let version = stage.register(8);
    assert!(stage.adapters(&["verify"]).code(0).out.contains("nobody signed it"));
    std::fs::write(stage.path("taod.toml"), with).unwrap();
    stage.adapters(&["promote", &version, "--reason", "a test"]).refused(&["is not signed"]);
    assert!(stage.adapters(&["sign"]).code(0).out.starts_with(&format!("{version} is signed by ")));
    stage.adapters(&["promote", &version, "--reason", "a test"]).code(0);
}

#[test]
fn a_server_that_trusts_keys_loads_nothing_that_none_of_them_signed() {
    let mut stage = Stage::new();
    stage.server_config = Some(stage.path("taod.toml"));
    stage.restart_server();
    let (first, second) = (stage.register(8), stage.register(32));
    // What is signed goes all the way, under its own name and under the stable one.
    stage.adapters(&["promote", &first, "--reason", "a test"]).code(0);
    assert_eq!(stage.ask_to_load("canary", &first).0, 200);
    // One version under another one's name, and one in another one's folder.
    stage.refuses_to_load(&second, &first, &format!("it says {first}"));
    let place = |version: &str| stage.path("state/registry/adapters").join(version);
    std::fs::rename(place(&second), stage.path("kept")).unwrap();
    let copied = Command::new("cp").arg("-r").arg(place(&first)).arg(place(&second)).status().unwrap();
    assert!(copied.success());
    stage.refuses_to_load("other", &second, &format!("it says {first}"));
    std::fs::remove_dir_all(place(&second)).unwrap();
    std::fs::rename(stage.path("kept"), place(&second)).unwrap();
    // Exchanged files, with the hashes as they were and made to fit; then no signature at all.
    let config = stage.file(&second, "adapter_config.json");
    let kept = std::fs::read(&config).unwrap();
    std::fs::write(&config, b"{}").unwrap();
    stage.refuses_to_load("other", &second, "has SHA-256");
    std::fs::write(&config, kept).unwrap();
    std::fs::rename(stage.file(&second, "manifest.sig"), stage.path("kept.sig")).unwrap();
    stage.refuses_to_load("other", &second, "is not signed");
    std::fs::rename(stage.path("kept.sig"), stage.file(&second, "manifest.sig")).unwrap();
    assert_eq!(stage.ask_to_load("other", &second).0, 200);
    exchange(&stage.file(&first, "adapter_config.json"), &stage.file(&first, "manifest.json"));
    stage.refuses_to_load("forged", &first, "does not fit what is there");
    // Keys of the server's own come before the registry's.
    let stranger = stage.path("stranger.pem").display().to_string();
    let public = taod_in(stage.folder.path(), &["adapters", "keygen", &stranger], &[]).code(0).out;
    let text = std::fs::read_to_string(stage.path("taod.toml")).unwrap();
    let other = stage.path("other.toml");
    std::fs::write(&other, format!("{text}[serve]\ntrusted_keys = [{:?}]\n", public.trim())).unwrap();
    stage.server_config = Some(other);
    stage.restart_server();
    stage.refuses_to_load("other", &second, "not among the trusted keys");
}
