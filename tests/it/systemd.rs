//! The units: how closed they are, and that those which belong together agree.

use std::process::Command;

use crate::harness::{files, has, root, text};

/// The highest exposure that a service may have, as `systemd-analyze security` counts it.
const EXPOSURE: f64 = 1.5;

#[test]
fn every_service_is_closed() {
    let found = Command::new("systemd-analyze").arg("--version").output().is_ok_and(|output| output.status.success());
    if !has("systemd", found, "install systemd") {
        return;
    }
    let mut count = 0;
    for path in files("systemd", "service") {
        let mut command = Command::new("systemd-analyze");
        let output = command.args(["security", "--offline=true"]).arg(root().join(&path)).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        let line =
            said.lines().find(|line| line.contains("Overall exposure level")).unwrap_or_else(|| panic!("{said}"));
        let words: Vec<&str> = line.split_whitespace().collect();
        let exposure: f64 = words.iter().find_map(|word| word.parse().ok()).unwrap_or_else(|| panic!("{line}"));
        assert!(exposure <= EXPOSURE, "{path}: {line}");
        count += 1;
    }
    assert!(count >= 3, "{count} services");
}

/// Returns the values of a key in a unit.
fn values(unit: &str, key: &str) -> Vec<String> {
    let prefix = format!("{key}=");
    text(unit).lines().filter_map(|line| line.strip_prefix(&prefix)).map(str::to_owned).collect()
}

#[test]
fn a_round_of_its_own_has_limits_and_shares_the_daemons_folder_and_user() {
    let (daemon, round) = ("systemd/taod.service", "systemd/taod-round.service");
    for key in
        ["User", "Group", "StateDirectory", "StateDirectoryMode", "WorkingDirectory", "UMask", "SystemCallFilter"]
    {
        assert_eq!(values(round, key), values(daemon, key), "{key}");
    }
    assert_eq!(values(round, "MemoryMax").len(), 1);
    let nice = |unit| values(unit, "Nice")[0].parse::<i32>().unwrap();
    assert!(nice(round) > nice(daemon), "a round gives way to ingestion");
    assert_eq!(values(round, "SuccessExitStatus"), ["2 3 75"], "the ordinary ends of a night are no failures");
    for unit in ["systemd/taod-round.path", "systemd/taod-round.timer"] {
        assert_eq!(values(unit, "Unit"), ["taod-round.service"], "{unit}");
    }
    let due = format!("/var/lib/taod/{}", taod::round::Paths::new("").due().display());
    assert_eq!(values("systemd/taod-round.path", "PathExists"), [due]);
}

#[test]
fn each_endpoints_daemon_has_a_folder_of_its_own_and_is_else_the_same() {
    let own = ["ExecStart", "StateDirectory", "WorkingDirectory"];
    for key in own {
        assert!(values("systemd/taod@.service", key)[0].contains("%i"), "{key}");
    }
    let directives = |unit: &str| -> Vec<String> {
        let kept = |line: &&str| line.contains('=') && !line.starts_with('#') && !line.starts_with("Description=");
        let shared = |line: &&str| own.iter().all(|key| !line.starts_with(&format!("{key}=")));
        text(unit).lines().filter(kept).filter(shared).map(str::to_owned).collect()
    };
    assert_eq!(directives("systemd/taod@.service"), directives("systemd/taod.service"));
}
