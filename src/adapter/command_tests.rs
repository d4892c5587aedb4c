//! Programs that train, well and badly, in the place of taod's own loop.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float32Type, Float64Type, UInt32Type};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use super::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

fn model() -> Model {
    Model::load(&fixture("tiny-llama").display().to_string()).unwrap()
}

/// Two prompts with two answers each, of which one tells no log-probs.
fn samples() -> Vec<Sample> {
    let sample = |group: &str, completion: &[u32], reward: f64| Sample {
        group: group.to_owned(),
        prompt: vec![5, 9, 12],
        completion: completion.to_vec(),
        reward,
        old_logprobs: (reward > 0.0).then(|| vec![-0.5; completion.len()]),
        base_logprobs: None,
    };
    vec![sample("a", &[7, 8], 1.0), sample("a", &[3], 0.0), sample("b", &[4, 4, 4], 0.25), sample("b", &[6], 0.5)]
}

/// A trainer in shell: `$1` is the dataset, `$2` the place of the adapter.
fn trainer(script: &str) -> Settings {
    let command = ["sh", "-c", script, "trainer"].map(str::to_owned).to_vec();
    Settings { command, rank: 4, max_kl: 100.0, ..Settings::default() }
}

fn run(settings: &Settings, out: &Path) -> Result<Outcome, String> {
    tune(&model(), &samples(), None, settings, 7, out, &Progress::silent()).map_err(|error| error.to_string())
}

fn copies(name: &str) -> String {
    format!("test -f \"$1/manifest.json\" && cp {}/* \"$2\"", fixture(name).display())
}

#[test]
fn a_program_gets_the_samples_and_gives_back_an_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let settings = trainer(&format!("echo once >> \"$1/../runs\"; {}", copies("tiny-llama-lora")));
    let outcome = run(&settings, folder.path()).unwrap();
    assert_eq!((outcome.groups_used, outcome.samples_used, outcome.tokens), (2, 4 - 1, 2 + 1 + 3));
    assert!(outcome.kl_sample > 0.0 && outcome.adapter_dir == folder.path().join(ADAPTER));
    let given = std::fs::read(fixture("tiny-llama-lora").join("adapter_model.safetensors")).unwrap();
    assert_eq!(std::fs::read(outcome.adapter_dir.join("adapter_model.safetensors")).unwrap(), given);

    let file = std::fs::File::open(folder.path().join("dataset/candidates.parquet")).unwrap();
    let batch = ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap().next().unwrap().unwrap();
    let list = |name: &str, row: usize| batch.column_by_name(name).unwrap().as_list::<i32>().value(row);
    for (row, sample) in samples().iter().enumerate() {
        assert_eq!(batch.column_by_name("group").unwrap().as_string::<i32>().value(row), sample.group);
        assert_eq!(batch.column_by_name("reward").unwrap().as_primitive::<Float64Type>().value(row), sample.reward);
        assert_eq!(list("prompt_ids", row).as_primitive::<UInt32Type>().values(), &sample.prompt[..]);
        assert_eq!(list("completion_ids", row).as_primitive::<UInt32Type>().values(), &sample.completion[..]);
        let logs = batch.column_by_name("logprobs").unwrap();
        assert_eq!(logs.is_valid(row), sample.old_logprobs.is_some());
        if let Some(told) = &sample.old_logprobs {
            assert_eq!(list("logprobs", row).as_primitive::<Float32Type>().values(), &told[..]);
        }
    }
    let told: Value = durable::read_json(&folder.path().join("dataset/settings.json")).unwrap();
    assert_eq!((told["seed"].clone(), told["tuning"]["rank"].clone()), (json!(7), json!(4)));
    assert_eq!(told["base_sha256"], model().identity().sha256);

    // A finished run is not done again, and one under other settings is another run.
    assert_eq!(run(&settings, folder.path()).unwrap(), outcome);
    assert_eq!(std::fs::read_to_string(folder.path().join("runs")).unwrap(), "once\n");
    let error = run(&Settings { epochs: 9, ..settings }, folder.path()).unwrap_err();
    assert!(error.contains("the hash of the settings"), "{error}");
}

#[test]
fn an_attempt_that_was_cut_short_begins_anew() {
    let folder = tempfile::tempdir().unwrap();
    let fails_once = "test -e \"$1/../again\" || { touch \"$1/../again\" \"$2/rubbish\"; exit 3; };";
    let settings = trainer(&format!("{fails_once} {}", copies("tiny-llama-lora")));
    let error = run(&settings, folder.path()).unwrap_err();
    assert!(error.contains("sh ended with exit status: 3"), "{error}");
    let outcome = run(&settings, folder.path()).unwrap();
    assert!(!outcome.adapter_dir.join("rubbish").exists());
}

#[test]
fn what_a_program_does_badly_leaves_no_adapter() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |name: &str, settings: &Settings, words: &str| {
        let out = folder.path().join(name);
        let error = run(settings, &out).unwrap_err();
        assert!(error.contains(words), "{name}: {error}");
        assert!(!out.join(ADAPTER).exists() && !out.join(OUTCOME).exists(), "{name}");
    };
    let missing = Settings { command: vec!["/no/such/program".into()], ..trainer("") };
    refused("missing", &missing, "/no/such/program cannot be run");
    refused("empty", &trainer("true"), "adapter_config.json");
    let other =
        format!("{} && sed -i 's/\"r\": [0-9]*/\"r\": 3/' \"$2/adapter_config.json\"", copies("tiny-llama-lora"));
    refused("other", &trainer(&other), "where [3, 64] is expected");
    // Every value of the weights zero, behind a header that stays.
    let zeroes = "python3 -c 'import struct, sys; p = sys.argv[1]; b = open(p, \"rb\").read(); \
                  n = 8 + struct.unpack(\"<Q\", b[:8])[0]; open(p, \"wb\").write(b[:n] + bytes(len(b) - n))' \
                  \"$2/adapter_model.safetensors\"";
    refused("zero", &trainer(&format!("{} && {zeroes}", copies("tiny-llama-lora"))), "changes nothing");
    let far = Settings { max_kl: 1e-9, ..trainer(&copies("tiny-llama-lora")) };
    refused("far", &far, "past tuning.max_kl");
}
