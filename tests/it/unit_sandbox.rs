//! taod under its units' own directives, which `tests/tools/unit_sandbox.py` applies without systemd: what has to be refused is
//! refused, each refusal goes with its directive, and ingestion, a round and a promotion work nevertheless.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use taod::query_log::embedded::EmbeddedBroker;
use taod::registry::Registry;
use taod::table::Name;

use crate::harness::night::{GENEROUS, Night, model, promotable};
use crate::harness::site::{self, port, wait_for};
use crate::harness::{files, has, root, text};
use crate::operations::{Running, age, log_call, says, until};

/// Stands in for the user `taod` and the group `taod-adapters`, who need not exist here.
const USER: &str = "62345:62346";

/// Returns true where the directives can be applied here.
fn sandboxes() -> bool {
    let told = Command::new("python3").arg(root().join("tests/tools/unit_sandbox.py")).arg("--can").output();
    let why = match &told {
        Ok(told) => format!("{}{}", String::from_utf8_lossy(&told.stdout), String::from_utf8_lossy(&told.stderr)),
        Err(_) => "there is no python3".into(),
    };
    has("sandbox", told.is_ok_and(|told| told.status.success()) && why.is_empty(), why.trim())
}

/// Returns a command that runs under a unit's directives, with this state folder.
fn under(unit: &Path, state: &Path, more: &[(&Path, &str)]) -> Command {
    let mut command = Command::new("python3");
    command.arg(root().join("tests/tools/unit_sandbox.py")).arg(unit).args(["--as", USER, "--state"]).arg(state);
    let folder = model();
    let models = (folder.parent().unwrap(), "/srv/models");
    for (source, path) in more.iter().chain([&models]) {
        command.arg("--bind").arg(format!("{}:{path}", source.display()));
    }
    command
}

/// What became of each try of `tests/tools/unit_probe.py`, and what it is told of itself.
#[derive(Debug, serde::Deserialize)]
struct Probed {
    tried: BTreeMap<String, String>,
    facts: BTreeMap<String, Value>,
}

/// Tries what a sandbox has to refuse, under a unit without some of its directives.
fn probe(unit: &str, without: &[&str]) -> Probed {
    let folder = tempfile::tempdir().unwrap();
    let kept = |line: &&str| !without.iter().any(|key| line.split_once('=').is_some_and(|(name, _)| name == *key));
    let lines: String = text(unit).lines().filter(kept).flat_map(|line| [line, "\n"]).collect();
    let (path, state) = (folder.path().join("unit.service"), folder.path().join("state"));
    std::fs::write(&path, lines).unwrap();
    std::fs::create_dir(&state).unwrap();
    let tools = root().join("tests/tools");
    let mut command = under(&path, &state, &[(&tools, "/usr/share/taod-probe")]);
    let inside = format!("/var/lib/{}", if unit.contains('@') { "taod-%i" } else { "taod" });
    let ran = command.args(["--", "python3", "/usr/share/taod-probe/unit_probe.py", &inside]).output().unwrap();
    let said = || String::from_utf8_lossy(&ran.stderr).into_owned();
    serde_json::from_slice(&ran.stdout).unwrap_or_else(|e| panic!("{unit} without {without:?}: {e}: {}", said()))
}

#[test]
fn what_a_service_may_not_do_is_refused_and_each_refusal_is_its_directives() {
    if !sandboxes() {
        return;
    }
    let refused = [
        ("write beside the state folder", "EROFS"),
        ("write to /etc", "EROFS"),
        ("write to /usr", "EROFS"),
        ("write to the models", "EROFS"),
        ("write to /sys", "EROFS"),
        ("see another's process", "ENOENT"),
        ("read /proc/meminfo", "ENOENT"),
        ("read a home", "EACCES"),
        ("read the kernel's log", "ENOENT"),
        ("map memory to write and execute", "EPERM"),
        ("make memory executable", "EPERM"),
        ("make a user namespace", "EPERM"),
        ("make a mount namespace", "EPERM"),
        ("open a netlink socket", "EAFNOSUPPORT"),
        ("change the personality", "EPERM"),
        ("be scheduled in real time", "EPERM"),
        ("set a set-user-ID bit", "EPERM"),
        ("give a file away", "SIGSYS"),
        ("set the host's name", "SIGSYS"),
        ("set the clock", "SIGSYS"),
        ("become root", "SIGSYS"),
        ("ask for the kernel's log", "SIGSYS"),
    ];
    let allowed = ["write to the state folder", "open a TCP socket", "read what the nodes have of memory"];
    let expected = refused.into_iter().chain(allowed.map(|name| (name, "done")));
    let expected: BTreeMap<String, String> = expected.map(|(name, said)| (name.into(), said.into())).collect();
    for unit in files("systemd", "service") {
        let Probed { tried, facts } = probe(&unit, &[]);
        assert_eq!(tried, expected, "{unit}");
        assert_eq!((facts["user"].as_u64(), facts["group"].as_u64()), (Some(62345), Some(62346)));
        assert_eq!(facts["mode"], "0o600", "{unit}");
        let empty = ["groups", "temporary"].iter().all(|key| facts[*key].as_array().is_some_and(Vec::is_empty));
        assert!(empty, "{unit}: {facts:?}");
        let devices = ["fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero"];
        assert_eq!(facts["devices"], Value::from(devices.to_vec()), "{unit}");
        let status = |key: &str| facts["status"][key].as_str().map(str::to_owned).unwrap();
        let rights = ["CapEff", "CapBnd", "CapAmb"].map(status);
        assert!(rights.iter().all(|bits| u64::from_str_radix(bits, 16) == Ok(0)), "{unit}: {rights:?}");
        assert_eq!((status("NoNewPrivs"), status("Seccomp")), ("1".into(), "2".into()), "{unit}");
    }

    // Without its directive each of these is another thing: the probe sees what it is there to see.
    let unit = "systemd/taod.service";
    for (directive, name, becomes) in [
        ("ProtectSystem", "write to /etc", "EACCES"),
        ("ProtectSystem", "write to the models", "EROFS"),
        ("ProtectProc", "see another's process", "done"),
        ("ProcSubset", "read /proc/meminfo", "done"),
        ("ProtectHome", "read a home", "done"),
        ("MemoryDenyWriteExecute", "map memory to write and execute", "done"),
        ("MemoryDenyWriteExecute", "make memory executable", "done"),
        ("RestrictNamespaces", "make a user namespace", "done"),
        ("RestrictAddressFamilies", "open a netlink socket", "done"),
        ("LockPersonality", "change the personality", "done"),
        ("RestrictSUIDSGID", "set a set-user-ID bit", "done"),
        ("SystemCallFilter", "give a file away", "EPERM"),
    ] {
        assert_eq!(probe(unit, &[directive]).tried[name], becomes, "{name} without {directive}");
    }
    assert_eq!(probe(unit, &["ProtectSystem", "ReadOnlyPaths"]).tried["write to the models"], "EACCES");
    assert_eq!(probe(unit, &["UMask"]).facts["mode"], "0o644");
    assert_ne!(probe(unit, &["PrivateDevices"]).facts["devices"].as_array().unwrap().len(), 11);
    assert_ne!(probe(unit, &["CapabilityBoundingSet"]).facts["status"]["CapBnd"], "0000000000000000");
}

#[test]
fn a_directive_that_nobody_applied_is_named() {
    if !sandboxes() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join("unit.service");
    for (line, named) in [
        ("ProtectEverything=yes", "ProtectEverything= is not known"),
        ("ProtectSystem=full", "ProtectSystem=full is not known"),
        ("CapabilityBoundingSet=CAP_CHOWN", "CapabilityBoundingSet=CAP_CHOWN is not known"),
    ] {
        let key = line.split('=').next().unwrap();
        let rest = text("systemd/taod.service").replace(&format!("\n{key}="), "\n#");
        std::fs::write(&unit, rest.replace("\n[Install]", &format!("\n{line}\n[Install]"))).unwrap();
        let ran = under(&unit, folder.path(), &[]).args(["--", "true"]).output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        assert!(!ran.status.success() && said.contains(named), "{line}: {said}");
    }
}

/// A night in a unit's places, its endpoint outside of them, and the broker of its log.
struct Stage {
    night: Night,
    broker: EmbeddedBroker,
    config: PathBuf,
    _serve: site::Running,
}

impl Stage {
    fn new() -> Self {
        let (night, broker, served) = (promotable(), EmbeddedBroker::start("live", 1).unwrap(), port());
        let folder = night.config().parent().unwrap().to_path_buf();
        let state = night.state();
        night.set(&format!(
            "[ingest]\ncommit_interval_s = 1\nend_interval_s = 1\n[ingest.kafka]\nbrokers = \"{}\"\ntopic = \"live\"\n\
             [admin]\nlisten = \"127.0.0.1:0\"\n[serve]\naddress = \"127.0.0.1:{served}\"\nbase_model = \"base\"\n\
             adapter_root = {:?}\n[endpoint]\nurls = [\"http://127.0.0.1:{served}\"]\n\
             [endpoint.path_map]\n\"/var/lib/taod\" = {state:?}\n",
            broker.brokers(),
            state.join("registry/adapters"),
        ));
        // A round of long ago that had nothing to do, so that another one is owed.
        night.worker(&[], &[("TAOD__REGISTRY__PROMOTION", "frozen")]).code(0);
        age(&night, "round-00001");
        let log = folder.join("serve.log");
        let mut serve = Command::new(env!("CARGO_BIN_EXE_taod"));
        serve.args(["serve", "--model"]).arg(model()).arg("--config").arg(night.config());
        let serve = site::Running::start(&mut serve, &log);
        wait_for(served, &log);
        let inside = std::fs::read_to_string(night.config()).unwrap();
        let inside = inside
            .replace(&format!("dir = {state:?}"), "dir = \"/var/lib/taod\"")
            .replace(&model().display().to_string(), "/srv/models/tiny-llama");
        let config = folder.join("inside.toml");
        std::fs::write(&config, inside).unwrap();
        Stage { night, broker, config, _serve: serve }
    }

    /// Returns the unit's own command under the unit's directives, with a gate that is easily convinced.
    fn command(&self, unit: &str) -> Command {
        let binary = Path::new(env!("CARGO_BIN_EXE_taod"));
        let places = [(binary, "/usr/bin/taod"), (self.config.as_path(), "/etc/taod/taod.toml")];
        let mut command = under(&root().join(unit), &self.night.state(), &places);
        for (key, value) in GENEROUS {
            command.arg("--environment").arg(format!("{key}={value}"));
        }
        let unit = text(unit);
        let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
        command.arg("--").args(start.split(' '));
        command
    }

    fn assert_promoted(&self) {
        let registry = Registry::open(&self.night.state().join("registry"), &Default::default()).unwrap();
        let version = registry.current().unwrap().version;
        let rows = self.night.rows(Name::Promotions);
        assert!(version != "base" && rows.len() == 1 && rows[0]["version"] == version.as_str(), "{version}: {rows:?}");
    }
}

#[test]
fn the_daemon_ingests_has_its_round_and_promotes_under_its_units_directives() {
    if !sandboxes() {
        return;
    }
    let stage = Stage::new();
    let log = stage.config.with_extension("log");
    let mut daemon = Running::spawn(&mut stage.command("systemd/taod.service"), &log);
    log_call(&stage.broker, "from outside");
    until("a row", &log, || (stage.night.rows(Name::Queries).len() > 300).then_some(()));
    until("the end of the round", &log, || says(&log, "\"the round ended\""));
    daemon.signal("TERM");
    let said = std::fs::read_to_string(&log).unwrap();
    assert_eq!(daemon.ended(), Some(0), "{said}");
    assert!(!said.contains("\"ERROR\""), "{said}");
    stage.assert_promoted();
}

#[test]
#[ignore = "a second night; the sandbox is the same"]
fn a_round_of_its_own_promotes_under_its_units_directives() {
    if !sandboxes() {
        return;
    }
    let stage = Stage::new();
    let ran = stage.command("systemd/taod-round.service").output().unwrap();
    let said = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(0), "{said}");
    stage.assert_promoted();
}
