//! What ends a one-shot command: one line that names the thing, the value and the remedy, code 1, nothing half-written.

use std::path::Path;
use std::process::Command;

use crate::harness::night::{Night, bytes_below, calls, model};
use crate::harness::{Outcome, has, root, taod_in};

/// Runs `taod generate` on one prompt.
fn generate(folder: &Path, model: &Path, more: &[&str]) -> Outcome {
    let input = folder.join("in.jsonl");
    std::fs::write(&input, "{\"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}]}\n").unwrap();
    let (model, input) = (model.display().to_string(), input.display().to_string());
    let few: &[&str] = if more.contains(&"--max-tokens") { &[] } else { &["--max-tokens", "2"] };
    let arguments = [&["generate", "--model", &model, "--input", &input], few, more].concat();
    taod_in(folder, &arguments, &[])
}

/// Copies a folder of files.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for (name, bytes) in bytes_below(from) {
        std::fs::write(to.join(name), bytes).unwrap();
    }
}

#[test]
fn a_model_that_cannot_be_used_is_named_with_the_remedy() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(generate(folder.path(), &model(), &[]).code(0).out.contains("token_ids"));

    generate(folder.path(), &at("missing.gguf"), &[]).refused(&["missing.gguf"]);

    let mut gguf = b"GGUF".to_vec();
    gguf.extend(3u32.to_le_bytes());
    gguf.extend(0u64.to_le_bytes());
    gguf.extend(1u64.to_le_bytes());
    for text in ["general.architecture", "mamba"] {
        gguf.extend((text.len() as u64).to_le_bytes());
        gguf.extend(text.as_bytes());
        if text == "general.architecture" {
            gguf.extend(8u32.to_le_bytes());
        }
    }
    std::fs::write(at("mamba.gguf"), gguf).unwrap();
    generate(folder.path(), &at("mamba.gguf"), &[]).refused(&["mamba.gguf", "mamba", "llama"]);

    copy(&model(), &at("cut"));
    let weights = std::fs::read(model().join("model.safetensors")).unwrap();
    std::fs::write(at("cut/model.safetensors"), &weights[..weights.len() / 2]).unwrap();
    generate(folder.path(), &at("cut"), &[]).refused(&["model.safetensors"]);
}

#[test]
fn an_adapter_of_another_base_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let lora = |name: &str| root().join("tests/fixtures/models").join(name).display().to_string();
    generate(folder.path(), &model(), &["--adapter", &lora("tiny-llama-lora")]).code(0);
    generate(folder.path(), &model(), &["--adapter", &lora("tiny-qwen3-lora")]).refused(&["tiny-qwen3-lora"]);
}

#[test]
fn a_broker_that_nobody_answers_for_is_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    drop(silent);
    let environment =
        [("TAOD__INGEST__KAFKA__BROKERS", address.as_str()), ("TAOD__INGEST__KAFKA__CONNECT_TIMEOUT_S", "2")];
    let outcome = taod_in(folder.path(), &["ingest", "--until-idle"], &environment);
    outcome.refused(&[&address, "ingest.kafka.brokers"]);
}

/// Returns true where an ordinary user may mount a small disk of their own here.
fn small_disks() -> bool {
    let mount = "mount -t tmpfs -o size=64k taod /mnt";
    let tried = Command::new("unshare").args(["-rm", "sh", "-c", mount]).output();
    let there = tried.is_ok_and(|output| output.status.success());
    has("small-disks", there, "user namespaces are switched off, so no full disk can be made")
}

/// A disk with 160 kB to spare does not hold what a round writes. The round ends with one line and, once there is space,
/// goes on to the bytes of a round that always had it.
#[test]
fn a_round_on_a_full_disk_says_so_and_goes_on_when_there_is_space() {
    if !small_disks() {
        return;
    }
    let (whole, night) = (Night::new(&calls(120)), Night::new(&calls(120)));
    whole.worker(&[], &[]);
    on_a_small_disk(&night, 160, &[]).refused(&["No space left on device", "free space"]);
    night.worker(&["--resume"], &[]);
    assert!(!whole.adapters().is_empty());
    assert!(night.adapters() == whole.adapters(), "the full disk left a trace");
}

#[test]
#[ignore = "minutes: a round again and again, a little further each time"]
fn a_disk_that_fills_up_in_any_stage_costs_no_more_than_the_stage() {
    if !small_disks() {
        return;
    }
    let (whole, night) = (Night::new(&calls(120)), Night::new(&calls(120)));
    whole.worker(&[], &[]);
    let mut stages = std::collections::BTreeSet::new();
    for room in 1.. {
        assert!(room < 100, "the disk is never large enough");
        let more: &[&str] = if night.round().join("plan.json").exists() { &["--resume"] } else { &[] };
        let outcome = on_a_small_disk(&night, 32 * room, more);
        if outcome.code != 1 {
            break;
        }
        stages.insert(furthest(&night));
        outcome.refused(&["No space left on device", "free space"]);
    }
    assert!(stages.len() >= 4, "it was full in these stages only: {stages:?}");
    assert!(night.adapters() == whole.adapters(), "a full disk left a trace");
    assert_eq!(night.json("outcome.json")["outcome"], whole.json("outcome.json")["outcome"]);
}

/// Returns the last thing that a round has done.
fn furthest(night: &Night) -> &'static str {
    let done = |path: &str| night.round().join(path).exists();
    let order = [
        ("registered.json", "the trial"),
        ("pass-2/adapter/outcome.json", "registering"),
        ("pass-2/candidates/manifest.json", "the second training"),
        ("pass-1/adapter/outcome.json", "the second candidates"),
        ("pass-1/candidates/manifest.json", "training"),
        ("dataset/manifest.json", "candidates"),
    ];
    order.into_iter().find(|(path, _)| done(path)).map_or("the dataset", |(_, stage)| stage)
}

/// Runs a round in a state folder on a disk of its own that has so much room beyond what is there.
fn on_a_small_disk(night: &Night, kib: u32, arguments: &[&str]) -> Outcome {
    let state = night.state().display().to_string();
    // Everything is copied onto the small disk, run there until it is full, and copied back.
    let script = format!(
        "set -e; cp -a {state} /tmp/taod-full.$$; mount -t tmpfs -o size=$((($(du -sk {state} | cut -f1) + {kib}) * 1024)) taod {state}; \
         cp -a /tmp/taod-full.$$/. {state}/; rm -r /tmp/taod-full.$$; code=0; \
         {} round-worker --config {} {} || code=$?; \
         mkdir {state}.kept; cp -a {state}/. {state}.kept/; exit $code",
        env!("CARGO_BIN_EXE_taod"),
        night.config().display(),
        arguments.join(" "),
    );
    let mut child = Command::new("unshare");
    child.args(["-rm", "sh", "-c", &script]).stdin(std::process::Stdio::piped());
    child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    let lifeline = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(lifeline);
    let outcome = Outcome {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    };
    std::fs::remove_dir_all(night.state()).unwrap();
    std::fs::rename(format!("{state}.kept"), &state).unwrap();
    let half = bytes_below(&night.state()).into_iter().filter(|(path, _)| path.contains(".tmp")).count();
    assert_eq!(half, 0, "a temporary file was left");
    outcome
}

#[test]
fn sampling_that_cannot_be_done_is_refused_with_what_it_lacks() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |more: &[&str], words: &[&str]| generate(folder.path(), &model(), more).refused(words);
    refused(&["--cache-mib", "0"], &["an answer of up to 2 need 1 MiB", "cache_mib = 0", "raise it"]);
    refused(&["--stop", ""], &["stop holds an empty string", "leave it out"]);
    let schema = folder.path().join("schema.json");
    let path = schema.display().to_string();
    refused(&["--json-schema", &path], &["schema.json", "No such file"]);
    for (text, words) in [
        ("{\"type\":", vec!["schema.json is not JSON"]),
        ("{\"type\": \"nothing\"}", vec!["schema.json", "cannot be followed", "nothing"]),
        ("{\"$ref\": \"https://example.com/a.json\"}", vec!["schema.json", "cannot be followed", "example.com"]),
    ] {
        std::fs::write(&schema, text).unwrap();
        refused(&["--json-schema", &path], &words);
    }
    std::fs::write(&schema, "{\"type\": \"boolean\"}").unwrap();
    let outcome = generate(folder.path(), &model(), &["--json-schema", &path, "--max-tokens", "40"]).code(0);
    let answer: serde_json::Value = serde_json::from_str(&outcome.out).unwrap();
    assert!(["true", "false"].contains(&answer["text"].as_str().unwrap().trim()), "{answer}");
}
