//! The demo's production traffic: human-written instructions with the house rules of several workloads, and what real
//! logs hold besides.
//!
//! The calls go over HTTP to the demo's endpoint, which logs them as a production endpoint's logger does. What an
//! endpoint of ours would never log (a masked row of a gateway, a record that is not JSON) is produced to the topic
//! beside them, because ingestion has to live with it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rdkafka::ClientConfig;
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::util::Timeout;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::durable::{self, FileError};
use crate::progress::Progress;
use crate::record::derive_seed;
use crate::rewards::Workload;

/// Share of the instructions that are asked a second time, unchanged.
const EXACT_DUPLICATES: f64 = 0.02;
/// Share of the instructions that are asked again with a slip of the hand.
const NEAR_DUPLICATES: f64 = 0.02;
/// Share of the calls whose client asked not to be trained on.
const OPT_OUTS: f64 = 0.02;
/// Calls to a model that does not exist: they fail, and are logged as failures.
const FAILED_CALLS: usize = 6;
/// Rows a gateway masked before it logged them.
const MASKED_ROWS: usize = 12;
/// Longest wait for the broker to take a record.
const SEND_WITHIN: Duration = Duration::from_secs(10);
/// Records that are no JSON at all.
const BROKEN_RECORDS: usize = 7;

/// One call to the endpoint.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    pub workload: String,
    pub text: String,
    pub user: String,
    pub train: bool,
    /// A model name that does not exist, for a call that is to fail.
    pub wrong_model: bool,
}

/// Everything the demo sends.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Traffic {
    pub calls: Vec<Call>,
    /// Payloads produced to the topic as they stand.
    pub raw: Vec<Vec<u8>>,
}

#[derive(Deserialize)]
struct Instruction {
    instruction: String,
}

/// Reads the instructions of AlpacaEval's file (a JSON array of objects with `instruction`), in the order of the file.
pub(super) fn read_instructions(path: &Path, max_chars: usize) -> Result<Vec<String>, FileError> {
    let all: Vec<Instruction> = durable::read_json(path)?;
    let texts = all.into_iter().map(|i| i.instruction.trim().to_string());
    Ok(texts.filter(|text| !text.is_empty() && text.chars().count() <= max_chars).collect())
}

/// Returns the traffic of a demo: `count` instructions chosen, spread over the workloads and ordered by the seed.
pub(super) fn plan(mut instructions: Vec<String>, workloads: &[Workload], count: usize, seed: u64) -> Traffic {
    let mut rng = ChaCha8Rng::seed_from_u64(derive_seed(seed, &["demo", "traffic"]));
    instructions.shuffle(&mut rng);
    instructions.truncate(count);
    let call = |index: usize, text: &str| {
        let workload = &workloads[index % workloads.len()];
        Call {
            workload: workload.name.clone(),
            text: format!("{text}\n\n{}", workload.house_rules),
            user: format!("user-{:03}", index % 97),
            train: true,
            wrong_model: false,
        }
    };
    let mut calls: Vec<Call> = instructions.iter().enumerate().map(|(index, text)| call(index, text)).collect();
    let share = |part: f64| (part * count as f64).round() as usize;
    for (index, text) in instructions.iter().enumerate().take(share(EXACT_DUPLICATES)) {
        calls.push(call(index, text));
    }
    for (index, text) in instructions.iter().enumerate().rev().take(share(NEAR_DUPLICATES)) {
        calls.push(call(index, &with_slip(text)));
    }
    for (index, text) in instructions.iter().enumerate().skip(count / 2).take(share(OPT_OUTS)) {
        // A word of its own keeps the opted-out prompt from being a duplicate of a consenting one.
        calls.push(Call { train: false, ..call(index, &format!("For my private notes: {text}")) });
    }
    for (index, text) in instructions.iter().enumerate().take(FAILED_CALLS) {
        calls.push(Call { wrong_model: true, ..call(index, text) });
    }
    calls.shuffle(&mut rng);
    Traffic { calls, raw: raw_records() }
}

/// Returns the text as somebody types it a second time: other case, no final mark, a space too many.
fn with_slip(text: &str) -> String {
    let mut slipped = text.trim_end_matches(['.', '?', '!']).replacen(' ', "  ", 1);
    if let Some(first) = slipped.get(..1).map(str::to_lowercase) {
        slipped.replace_range(..1, &first);
    }
    slipped
}

fn raw_records() -> Vec<Vec<u8>> {
    let masked = (0..MASKED_ROWS).map(|index| {
        let payload = json!({
            "id": format!("masked-{index}"), "call_type": "acompletion", "status": "success", "model": "base",
            "startTime": 1_760_000_000.0 + index as f64, "endTime": 1_760_000_001.0 + index as f64,
            "messages": [{"role": "user", "content": "redacted-by-litellm"}],
            "response": {"choices": [{"message": {"role": "assistant", "content": "redacted-by-litellm"}, "finish_reason": "stop"}]},
            "model_parameters": {}, "metadata": {}, "end_user": format!("user-{index:03}")
        });
        payload.to_string().into_bytes()
    });
    let broken = (0..BROKEN_RECORDS).map(|index| format!("level=info msg=\"health check {index}\"").into_bytes());
    masked.chain(broken).collect()
}

/// Sends the calls, at most `concurrency` at a time, and returns how many were answered with success.
///
/// A call that fails is part of the traffic; only an endpoint that cannot be reached at all is an error.
pub(super) async fn send(
    url: &str,
    model: &str,
    calls: &[Call],
    max_tokens: usize,
    temperature: f64,
    concurrency: usize,
    progress: &Progress,
) -> Result<usize, reqwest::Error> {
    let client = reqwest::Client::new();
    let gate = Arc::new(Semaphore::new(concurrency));
    let mut tasks = tokio::task::JoinSet::new();
    for (index, call) in calls.iter().enumerate() {
        let (client, gate, url) = (client.clone(), gate.clone(), format!("{url}/v1/chat/completions"));
        let model = if call.wrong_model { "no-such-model" } else { model };
        let body = request(call, model, max_tokens, temperature, index as u64);
        let train = call.train;
        tasks.spawn(async move {
            // The semaphore is never closed, so a permit always comes.
            let _permit = gate.acquire_owned().await;
            let mut request = client.post(url).json(&body);
            if !train {
                request = request.header("x-taod-train", "false");
            }
            let response = request.send().await?;
            let ok = response.status().is_success();
            response.bytes().await?;
            Ok::<bool, reqwest::Error>(ok)
        });
    }
    let mut step = progress.step("send production traffic", calls.len() as u64, "calls");
    let mut answered = 0;
    while let Some(joined) = tasks.join_next().await {
        match joined {
            Ok(result) => answered += usize::from(result?),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
        step.advance(1, "");
    }
    Ok(answered)
}

/// Produces records to the topic as they stand, and waits until the broker has them.
pub(super) async fn produce(brokers: &str, topic: &str, payloads: &[Vec<u8>]) -> anyhow::Result<()> {
    let producer: FutureProducer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    for payload in payloads {
        let record = FutureRecord::<(), [u8]>::to(topic).payload(payload.as_slice());
        producer.send(record, Timeout::After(SEND_WITHIN)).await.map_err(|(error, _)| error)?;
    }
    Ok(())
}

fn request(call: &Call, model: &str, max_tokens: usize, temperature: f64, seed: u64) -> Value {
    json!({
        "model": model,
        "messages": [{"role": "user", "content": call.text}],
        "max_tokens": max_tokens, "temperature": temperature, "seed": seed,
        "user": call.user,
        "metadata": {"workload": call.workload},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Match;

    fn workloads() -> Vec<Workload> {
        let named = |name: &str| Workload {
            name: name.into(),
            matching: Match::Name,
            house_rules: format!("Rule of {name}."),
            rules: Vec::new(),
        };
        vec![named("a"), named("b"), named("c")]
    }

    #[test]
    fn the_traffic_is_a_function_of_the_seed_and_holds_what_logs_hold() {
        let texts: Vec<String> = (0..200).map(|i| format!("Say something about number {i}.")).collect();
        let traffic = plan(texts.clone(), &workloads(), 100, 7);
        assert_eq!(traffic, plan(texts.clone(), &workloads(), 100, 7));
        assert_ne!(traffic.calls, plan(texts, &workloads(), 100, 8).calls);
        assert_eq!(traffic.calls.len(), 100 + 2 + 2 + 2 + FAILED_CALLS);
        assert_eq!(traffic.calls.iter().filter(|c| !c.train).count(), 2);
        assert_eq!(traffic.calls.iter().filter(|c| c.wrong_model).count(), FAILED_CALLS);
        assert_eq!(traffic.raw.iter().filter(|r| serde_json::from_slice::<Value>(r).is_err()).count(), BROKEN_RECORDS);
    }

    #[test]
    fn a_slip_changes_the_bytes_and_keeps_the_words() {
        assert_eq!(with_slip("What is a cat?"), "what  is a cat");
    }
}
