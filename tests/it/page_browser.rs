//! The page in Chromium, over the state of a real night, with a real endpoint and the real daemon behind it.

use std::path::PathBuf;
use std::process::Command;

use crate::harness::site::Site;
use crate::harness::{cache, has, root};

/// Returns the folder with playwright-core and axe-core, where this machine has them and Chromium.
fn browser() -> Option<PathBuf> {
    let modules = cache().join("page");
    let runs =
        |program: &str| Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success());
    let there = runs("node") && runs("chromium") && modules.join("node_modules/axe-core").exists();
    has("chromium", there, "run tools/setup.sh page").then_some(modules)
}

#[test]
#[ignore = "a minute, and a browser"]
fn the_page_works_in_a_browser() {
    let Some(modules) = browser() else { return };
    let site = Site::open();
    let (operate, read) = (site.token("olga", "operate"), site.token("ruth", "read"));
    let out = std::env::var_os("TAOD_SCREENSHOTS")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| site.folder().join("screenshots"), PathBuf::from);
    std::fs::create_dir_all(&out).unwrap();
    let status = Command::new("node")
        .arg(root().join("tests/page/page.mjs"))
        .args([format!("http://127.0.0.1:{}", site.page), operate, read])
        .args([&modules, &out])
        .output()
        .unwrap();
    assert!(status.status.success(), "{}\nthe daemon said:\n{}", String::from_utf8_lossy(&status.stderr), site.log());
}
