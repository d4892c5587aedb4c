//! Imports follow the data: a module uses only what lies below it. And no file is too long to be read.

use std::collections::BTreeSet;

use crate::harness::{files, text};

/// The layers, lowest first. Modules of one layer do not use each other.
const LAYERS: &[&[&str]] = &[
    &["crash", "durable", "health", "json", "metrics", "progress", "secret"],
    &["layout", "signature"],
    &["notify", "record", "telemetry"],
    &["query_log", "engine"],
    &["table"],
    &["dataset"],
    &["candidates"],
    &["rewards"],
    &["adapter"],
    &["reward_model"],
    &["gate"],
    &["registry"],
    &["endpoint", "serve"],
    &["config"],
    &["ingest", "schedule", "round"],
    &["audit", "erasure"],
    &["admin", "doctor"],
    &["daemon"],
    &["demo"],
    &["simulate"],
    &["cli"],
    &["main"],
];

/// The most lines a source file may have.
const LINES_MAX: usize = 500;

fn layer(module: &str) -> usize {
    LAYERS.iter().position(|layer| layer.contains(&module)).unwrap_or_else(|| {
        panic!("the module {module} is in no layer; add it to the list in tests/it/layers.rs and to ARCHITECTURE.md")
    })
}

/// Returns the top-level module of a source file.
fn module_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap();
    inside.split('/').next().unwrap().trim_end_matches(".rs")
}

/// Returns what a source uses of its own crate, each as (module, the name after it).
fn imports(source: &str) -> BTreeSet<(String, String)> {
    let code: String =
        source.lines().filter(|line| !line.trim_start().starts_with("//")).map(|l| l.to_string() + "\n").collect();
    let mut found = BTreeSet::new();
    for prefix in ["crate::", "taod::"] {
        for (at, _) in code.match_indices(prefix) {
            // `$crate::`, `foo_crate::` and `"taod::ingest=debug"` are something else.
            let before = code[..at].chars().next_back().unwrap_or(' ');
            if before.is_alphanumeric() || "_$\",".contains(before) {
                continue;
            }
            paths(&code[at + prefix.len()..], &mut found);
        }
    }
    found
}

/// Adds the modules of one path, or of each path of a group in braces.
fn paths(rest: &str, found: &mut BTreeSet<(String, String)>) {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let pair = |text: &str| {
        let module = word(text);
        let after = text[module.len()..].strip_prefix("::").map(word).unwrap_or_default();
        (module, after)
    };
    let Some(group) = rest.strip_prefix('{') else {
        found.insert(pair(rest));
        return;
    };
    let mut depth = 0;
    let mut start = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                let item = group[start..at].trim();
                if !item.is_empty() {
                    found.insert(pair(item));
                }
                start = at + 1;
                if c == '}' {
                    return;
                }
            }
            _ => {}
        }
    }
}

/// Returns the imports of a file that go up or sideways.
fn violations(path: &str, source: &str) -> Vec<String> {
    let own = module_of(path);
    if own == "lib" {
        return vec![];
    }
    let allowed = |(module, name): &(String, String)| {
        // The config is made of everyone's settings, and of nothing else of theirs. A file of tests may use what stands
        // beside it: the endpoint's drivers are tested against our own server.
        let beside = path.ends_with("tests.rs") && layer(module) == layer(own);
        module == own || layer(module) < layer(own) || beside || (own == "config" && name == "Settings")
    };
    let upward = imports(source).into_iter().filter(|import| !allowed(import));
    upward.map(|(module, name)| format!("{path}: {own} uses {module}::{name}, which is not below it")).collect()
}

#[test]
fn imports_go_down() {
    let sources = files("src", "rs");
    assert!(sources.len() > 20, "{sources:?}");
    let found: Vec<String> = sources.iter().flat_map(|path| violations(path, &text(path))).collect();
    assert!(found.is_empty(), "\n{}", found.join("\n"));
}

#[test]
fn an_upward_import_is_found_in_every_spelling() {
    let upward = [
        "use crate::gate::Passed;",
        "use crate::{record::Message, gate::{self, Passed}};",
        "use crate::{\n    durable,\n    gate,\n};",
        "fn f() -> crate::gate::Passed {}",
    ];
    for source in upward {
        assert_eq!(violations("src/dataset/mod.rs", source).len(), 1, "{source}");
        assert!(violations("src/registry/mod.rs", source).is_empty(), "{source}");
    }
    assert!(violations("src/dataset/mod.rs", "//! See [`crate::gate`].\nuse crate::dataset::x;").is_empty());
    assert_eq!(violations("src/config/mod.rs", "crate::admin::Settings, crate::admin::State").len(), 1);
    assert_eq!(violations("src/serve/mod.rs", "use crate::endpoint::Driver;").len(), 1, "sideways");
    assert!(violations("src/serve/a_tests.rs", "use crate::endpoint::Driver;").is_empty(), "a test beside it");
    assert_eq!(violations("src/serve/a_tests.rs", "use crate::round::run;").len(), 1, "a test above it");
}

#[test]
fn every_source_file_can_be_read_in_one_go() {
    let long: Vec<String> = [files("src", "rs"), files("tests", "rs")]
        .concat()
        .iter()
        .map(|path| (path, text(path).lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .map(|(path, lines)| format!("{path} has {lines} lines, more than {LINES_MAX}; it holds two ideas"))
        .collect();
    assert!(long.is_empty(), "\n{}", long.join("\n"));
}
