//! The JSON API against its own OpenAPI document, by Schemathesis: requests that fit the document and requests that do not,
//! from a real daemon over the state of a real night.

use std::path::PathBuf;
use std::process::Command;

use crate::harness::site::Site;
use crate::harness::{cache, has};

fn schemathesis() -> Option<PathBuf> {
    let program = cache().join("schemathesis/bin/schemathesis");
    has("schemathesis", program.is_file(), "run `tools/setup.sh full`").then_some(program)
}

#[test]
#[ignore = "a minute, and Schemathesis: `make test-full`"]
fn every_answer_of_the_api_is_what_its_document_says_whatever_is_asked() {
    let Some(program) = schemathesis() else { return };
    let site = Site::open();
    for role in ["read", "operate"] {
        let token = site.token(role, role);
        let mut command = Command::new(&program);
        command.arg("run").arg(format!("http://127.0.0.1:{}/api/v1/openapi.json", site.page));
        command.args(["--header", &format!("Authorization: Bearer {token}")]);
        command.args(["--checks", "all", "--max-examples", "40", "--seed", "7", "--continue-on-failure"]);
        // A round would go on beside the requests that follow.
        command.args(["--exclude-path", "/api/v1/actions/run", "--warnings", "off", "--no-color"]);
        let ended = command.current_dir(site.folder()).output().unwrap();
        let said = String::from_utf8_lossy(&ended.stdout);
        assert!(
            ended.status.success(),
            "as {role}:\n{said}\n{}\n{}",
            String::from_utf8_lossy(&ended.stderr),
            site.log()
        );
        assert!(said.contains("No issues found") || said.contains("passed"), "{said}");
    }
    let log = site.log();
    assert!(!log.contains("panicked"), "{log}");
}
