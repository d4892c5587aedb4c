//! The units of a round, run by a real systemd: a user's manager in namespaces of its own, which has no need to be the machine's
//! first process. What such a manager cannot do is left out of the units: their user, their state folder and their sandbox.

use std::path::{Path, PathBuf};
use std::process::Command;

use taod::query_log::embedded::EmbeddedBroker;

use crate::harness::night::Night;
use crate::harness::{has, root};
use crate::operations::{age, live};

/// Returns true where a user's manager can run here.
fn managers() -> bool {
    let systemd = Path::new("/lib/systemd/systemd").exists();
    let tried =
        Command::new("unshare").args(["-rmpf", "--mount-proc", "mount", "-t", "tmpfs", "tmpfs", "/run"]).output();
    let there = systemd && tried.is_ok_and(|output| output.status.success());
    has("systemd-user", there, "install systemd, and allow user namespaces")
}

/// Writes a unit for this test: other paths, and without what only the machine's manager can do.
fn unit(night: &Night, name: &str, folder: &Path) {
    let text = std::fs::read_to_string(root().join("systemd").join(name)).unwrap();
    let (before, sandbox) = text.split_once("# The sandbox.").unwrap_or((&text, ""));
    let install = sandbox.split_once("[Install]").map_or(String::new(), |(_, rest)| format!("[Install]{rest}"));
    let dropped = ["User=", "Group=", "StateDirectory", "After=", "Wants="];
    let kept = before.lines().filter(|line| !dropped.iter().any(|key| line.starts_with(key)));
    let text: String = kept.chain(install.lines()).map(|line| format!("{line}\n")).collect();
    let state = night.state().display().to_string();
    let text = text
        .replace("/usr/bin/taod", env!("CARGO_BIN_EXE_taod"))
        .replace("/etc/taod/taod.toml", &night.config().display().to_string())
        .replace("/var/lib/taod", &state)
        // The same timer, due at once.
        .replace("OnCalendar=*-*-* 02:00:00", "OnActiveSec=1s");
    std::fs::write(folder.join(name), text).unwrap();
}

#[test]
#[ignore = "two rounds under a systemd of its own"]
fn the_path_starts_the_round_that_the_daemon_asks_for_and_the_timer_starts_one_too() {
    if !managers() {
        return;
    }
    let broker = EmbeddedBroker::start("live", 1).unwrap();
    let night = live(&broker);
    night.worker(&[], &[("TAOD__REGISTRY__PROMOTION", "frozen")]).code(0);
    age(&night, "round-00001");
    night.set("[schedule]\nrun_in = \"unit\"\n");
    let home = night.config().parent().unwrap().join("home");
    let units: PathBuf = home.join(".config/systemd/user");
    std::fs::create_dir_all(&units).unwrap();
    for name in ["taod.service", "taod-round.path", "taod-round.service", "taod-round.timer"] {
        unit(&night, name, &units);
    }
    let rounds = night.state().join("rounds").display().to_string();
    let script = format!(
        r#"set -u
mount -t tmpfs tmpfs /run && mkdir -p /run/systemd/system && mkdir -m 700 /run/user
export HOME={home} XDG_RUNTIME_DIR=/run/user
unset DBUS_SESSION_BUS_ADDRESS
/lib/systemd/systemd --user --log-target=console --log-level=info 2>"$HOME/manager.log" &
until [ -S /run/user/systemd/private ]; do sleep 0.1; done
wait_for() {{ for i in $(seq 1200); do [ -e "$1" ] && return 0; sleep 0.1; done; echo "$1 did not come"; cat "$HOME/manager.log"; exit 1; }}
systemctl --user start taod-round.path taod.service || {{ cat "$HOME/manager.log"; exit 1; }}
wait_for {rounds}/round-00002/outcome.json
for i in $(seq 600); do [ "$(systemctl --user is-active taod-round.service)" = inactive ] && break; sleep 0.1; done
systemctl --user show taod-round.service -p Result -p ExecMainStatus
[ -e {state}/round.due ] && {{ echo "round.due was left"; exit 1; }}
systemctl --user start taod-round.timer
wait_for {rounds}/round-00003/plan.json
systemctl --user show taod-round.service -p TriggeredBy
systemctl --user is-active taod.service
systemctl --user stop taod.service && systemctl --user show taod.service -p Result
"#,
        home = home.display(),
        state = night.state().display(),
    );
    let ran = Command::new("unshare").args(["-rmpf", "--mount-proc", "bash", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    let manager = || std::fs::read_to_string(home.join("manager.log")).unwrap_or_default();
    assert!(ran.status.success(), "{}: {said}\n{}\n{}", ran.status, String::from_utf8_lossy(&ran.stderr), manager());
    for part in ["Result=success", "taod-round.path", "taod-round.timer", "active"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}
