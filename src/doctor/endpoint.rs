//! Each replica of the endpoint: whether it answers, takes adapters, has what is served, and agrees about the time.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use chrono::TimeDelta;

use super::{Check, Finding};
use crate::config::Config;
use crate::endpoint::fleet::{Fleet, Target};
use crate::endpoint::inspect::{self, Memory, Words};
use crate::endpoint::server::{Load, Server};
use crate::endpoint::{EndpointError, Kind, Settings};
use crate::engine::{Adapter, Model, save_peft};
use crate::registry::{BASE, Registry};
use crate::round::Paths;

/// How far clocks may be apart: the watch leaves out what is nearer to a promotion than `settle_seconds`, 60 by default.
const DRIFT: TimeDelta = TimeDelta::seconds(5);
const WRONG: TimeDelta = TimeDelta::seconds(60);

/// Looks at all replicas. `zero` is there where an adapter that changes nothing is to be loaded; it is made for the model
/// inside, which is missing where the model could not be loaded.
pub(super) async fn check(config: &Config, zero: Option<Option<&Model>>) -> Vec<Finding> {
    let settings = &config.endpoint;
    let opened = Fleet::new(settings).map(|fleet| (fleet, settings));
    let (fleet, words) = match opened {
        Ok((fleet, settings)) => match inspect::words(settings).await {
            Ok(words) => (fleet, words),
            Err(error) => return vec![unusable(&error)],
        },
        Err(error) => return vec![unusable(&error)],
    };
    let served = served(config, &fleet);
    let mut findings = vec![clock(&words)];
    if let Err(finding) = &served {
        findings.push(finding.clone());
    }
    findings.extend(strangers(config, &fleet).await);
    let asked = matches!(settings.kind, Kind::Serve | Kind::Vllm | Kind::Sglang | Kind::Mistralrs | Kind::Llamacpp);
    for (place, (replica, words)) in fleet.replicas.iter().zip(words).enumerate() {
        let look = Replica { config, fleet: &fleet, server: replica.as_ref(), place };
        match words {
            Err(error) => findings.push(unreachable(&error)),
            Ok(words) => findings.extend(look.check(asked, &words, served.as_ref().ok()).await),
        }
    }
    match zero {
        Some(Some(model)) => findings.extend(load(config, &fleet, model).await),
        Some(None) => {
            let remedy = "mend the check `model` first: the adapter is made for it";
            findings.push(Finding::failure(Check::Endpoint, "no adapter could be loaded on the replicas", remedy));
        }
        None => findings.extend(readable(config)),
    }
    findings
}

fn unusable(error: &EndpointError) -> Finding {
    Finding::failure(Check::Endpoint, error.to_string(), "correct what the message names under [endpoint]")
}

fn unreachable(error: &EndpointError) -> Finding {
    let remedy =
        "see that the server runs; nothing is promoted until every replica answers, and clients are not affected";
    Finding::failure(Check::Endpoint, error.to_string(), remedy)
}

/// Returns what clients get, as the endpoint knows it.
fn served(config: &Config, fleet: &Fleet) -> Result<Target, Finding> {
    let root = Paths::new(&config.state.dir).registry();
    if !root.is_dir() {
        return Ok(Target::base(&fleet.base_model));
    }
    let registry = Registry::open(&root, &config.registry).and_then(|registry| {
        let version = registry.current()?.version;
        if version != BASE {
            registry.verify(&version)?;
        }
        Ok(fleet.target(&registry, &version))
    });
    registry.map_err(|error| {
        let remedy = "restore the registry together with the tables (docs/runbooks/restore.md)";
        Finding::failure(Check::Endpoint, error.to_string(), remedy)
    })
}

/// Tells where the stable name leads to a version of another registry: a second daemon has the same name.
async fn strangers(config: &Config, fleet: &Fleet) -> Vec<Finding> {
    let root = Paths::new(&config.state.dir).registry();
    // Without a registry that can be read nobody can tell whose a version is; another check says why it cannot.
    let Ok(registry) = root.is_dir().then(|| Registry::open(&root, &config.registry)).transpose() else {
        return Vec::new();
    };
    let mut findings = Vec::new();
    for place in fleet.places() {
        // A place that cannot be asked is told by the checks of replicas.
        if let Ok(Some(found)) = fleet.stranger(place, registry.as_ref()).await {
            let name = &fleet.stable_name;
            let says = format!("the name '{name}' at {} leads to {found}, which this registry never made", place.url());
            let remedy = "if another daemon has this endpoint.stable_name, give one of them another; if it is what production had before \
                          taod, `taod adapters import` it; else `taod adapters settle --take-over`";
            findings.push(Finding::failure(Check::Endpoint, says, remedy));
        }
    }
    findings
}

/// One replica under examination.
struct Replica<'a> {
    config: &'a Config,
    fleet: &'a Fleet,
    server: &'a dyn Server,
    place: usize,
}

impl Replica<'_> {
    async fn check(&self, asked: bool, words: &Words, served: Option<&Target>) -> Vec<Finding> {
        let (settings, url) = (&self.config.endpoint, self.server.url());
        let mut findings = Vec::new();
        if asked && let Err(error) = inspect::answers(self.server, &settings.base_model).await {
            let remedy =
                "set endpoint.base_model to the name at the server's /v1/models; the proof also needs `logprobs`";
            findings.push(Finding::failure(Check::Endpoint, error.to_string(), remedy));
        }
        if let Some(Err(error)) = inspect::routes(self.fleet, settings, self.place).await {
            findings.push(Finding::failure(Check::Endpoint, error.to_string(), routes_remedy(settings.kind)));
        }
        if let Some((name, folder)) = served.and_then(|target| Some((&target.name, target.folder()?))) {
            findings.extend(self.holds(name, folder).await);
        }
        findings.extend(limits(settings, words));
        if findings.iter().all(|finding| finding.state == super::State::Ok) {
            let has = served.map_or(String::new(), |target| format!(" and has {}", target.name));
            findings.insert(0, Finding::ok(Check::Endpoint, format!("{url} answers{has}")));
        }
        findings
    }

    async fn holds(&self, name: &str, folder: &Path) -> Option<Finding> {
        let url = self.server.url();
        match self.server.holds(name, folder).await {
            Ok(true) => None,
            Ok(false) => {
                let says = format!("{url} does not have {name}, which clients should get");
                let remedy = "`taod run` puts it back within a minute; without the daemon, `taod adapters settle` does";
                Some(Finding::warning(Check::Endpoint, says, remedy))
            }
            Err(error) => Some(unreachable(&error)),
        }
    }
}

fn routes_remedy(kind: Kind) -> &'static str {
    match kind {
        Kind::Serve => "set serve.adapter_root to the registry's folder of adapters",
        _ => "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment",
    }
}

/// Tells what is known of a server's own settings: vLLM's limits on adapters, and what llama.cpp remembers.
fn limits(settings: &Settings, words: &Words) -> Option<Finding> {
    let url = &words.url;
    match (settings.kind, words.max_loras) {
        (Kind::Llamacpp, _) => words.memory.map(|found| memory(url, found)),
        (Kind::Vllm, Some(max @ 0..2)) => {
            let says = format!(
                "{url} has --max-loras {max}: while two versions are asked, their requests wait for each other"
            );
            Some(Finding::warning(Check::Endpoint, says, "start vLLM with --max-loras 2 or more"))
        }
        (Kind::Vllm, Some(max)) => {
            let says = format!(
                "{url} has --max-loras {max}; it does not tell --max-cpu-loras, which must be one more than the versions that are kept"
            );
            Some(Finding::ok(Check::Endpoint, says))
        }
        (Kind::Vllm, None) => {
            let says = format!(
                "{url} does not tell --max-loras (want 2 or more) nor --max-cpu-loras (want one more than the versions that are kept)"
            );
            Some(Finding::ok(Check::Endpoint, says))
        }
        _ => None,
    }
}

/// Judges what a llama.cpp server remembers: a change of adapters leaves it as it was.
fn memory(url: &str, memory: Memory) -> Finding {
    let remedy = "start it with `--no-cache-prompt --cache-ram 0` (docs/endpoints.md)";
    match memory {
        Memory::Always => {
            let says = format!(
                "{url} goes on from prompts that it answered before, also under another adapter: the second promotion would not be \
                 proven and be undone"
            );
            Finding::failure(Check::Endpoint, says, remedy)
        }
        Memory::OnRequest => {
            let says = format!(
                "{url} keeps prompts in memory without regard to adapters: a client that asks with `cache_prompt` may get answers that \
                 mix two of them"
            );
            Finding::warning(Check::Endpoint, says, remedy)
        }
        Memory::Nothing => Finding::ok(Check::Endpoint, format!("{url} remembers no prompts")),
        Memory::Untold => {
            let says = format!(
                "{url} does not tell how many tokens of a prompt it computed, so whether it has `--no-cache-prompt --cache-ram 0` is not known"
            );
            Finding::warning(Check::Endpoint, says, remedy)
        }
    }
}

fn clock(words: &[Result<Words, EndpointError>]) -> Finding {
    let told = words.iter().flatten().filter_map(|words| Some((&words.url, words.ahead?)));
    let Some((url, ahead)) = told.max_by_key(|(_, ahead)| ahead.abs()) else {
        let remedy = "see that this machine keeps time by NTP (`timedatectl`)";
        return Finding::warning(Check::Clock, "no replica told the time, so the clock could not be compared", remedy);
    };
    let seconds = ahead.num_milliseconds() as f64 / 1000.0;
    let side = if seconds > 0.0 { "behind" } else { "ahead of" };
    let says = format!("this machine is {:.0} s {side} {url}", seconds.abs());
    let remedy =
        "let both keep time by NTP (`timedatectl`): leases, the schedule and the watch over promotions go by it";
    match ahead.abs() {
        off if off > WRONG => Finding::failure(Check::Clock, says, remedy),
        off if off > DRIFT => Finding::warning(Check::Clock, says, remedy),
        _ => Finding::ok(Check::Clock, format!("this machine agrees with {url}")),
    }
}

/// Warns where a server of another user could not read the registry: seen from here, not proved.
fn readable(config: &Config) -> Option<Finding> {
    let reads = matches!(config.endpoint.kind, Kind::Vllm | Kind::Sglang | Kind::Mistralrs | Kind::Directory);
    let folder = Paths::new(&config.state.dir).registry();
    let closed = |path: &&Path| std::fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o055 == 0);
    let first = folder.ancestors().filter(|_| reads && folder.is_dir()).find(closed)?.to_path_buf();
    let says = format!(
        "{} is open to its owner alone, so a server that runs as another user cannot read adapters",
        first.display()
    );
    let remedy = "prove it with `taod doctor --load`; if it fails, give the server's user the folder by a group (docs/operations.md)";
    Some(Finding::warning(Check::Endpoint, says, remedy))
}

/// Loads an adapter that changes nothing on every replica, asks it, and unloads it. Its folder stays: a server may read it
/// again, and vLLM's engine dies of one that is gone.
async fn load(config: &Config, fleet: &Fleet, model: &Model) -> Vec<Finding> {
    if !config.endpoint.pull_url.is_empty() {
        let says = "servers fetch adapters from endpoint.pull_url, which hands out registered versions alone; the next promotion \
                    shows whether they can";
        return vec![Finding::ok(Check::Endpoint, says)];
    }
    let target = match zero(config, model) {
        Ok(target) => target,
        Err(error) => {
            let remedy = "mend the checks `state` and `model` first";
            return vec![Finding::failure(Check::Endpoint, format!("no adapter could be made: {error:#}"), remedy)];
        }
    };
    let mut findings = Vec::new();
    for replica in &fleet.replicas {
        let url = replica.url();
        findings.push(match try_one(replica.as_ref(), &target).await {
            Ok(()) => Finding::ok(Check::Endpoint, format!("{url} loaded an adapter, answered with it and unloaded it")),
            // It read the folder, and refused what no key signed; no more can be asked without a version.
            Err(EndpointError::Status { message, .. }) if message.contains("is not signed") => {
                let says = format!("{url} found the adapter and refused it unsigned, as its trusted keys ask; a load is shown by the next promotion");
                Finding::ok(Check::Endpoint, says)
            }
            Err(error) => {
                let remedy = "let the server's user read the registry (endpoint.path_map where it sees another path), and raise its \
                              --max-lora-rank to tuning.rank; docs/endpoints.md";
                Finding::failure(Check::Endpoint, error.to_string(), remedy)
            }
        });
    }
    findings
}

fn zero(config: &Config, model: &Model) -> anyhow::Result<Target> {
    let registry = Registry::open(&Paths::new(&config.state.dir).registry(), &config.registry)?;
    let spec = config.tuning.lora();
    let name = format!("taod-doctor-r{}-{}", spec.rank, &model.identity().sha256[..12]);
    let folder = std::path::absolute(registry.path(&name))?;
    if !folder.join("adapter_config.json").is_file() {
        let tensors = Adapter::zero(model, &spec)?.tensors(model.config())?;
        save_peft(&folder, model.identity(), &spec, &tensors)?;
    }
    Ok(Target::unregistered(name, folder))
}

async fn try_one(replica: &dyn Server, target: &Target) -> Result<(), EndpointError> {
    let Some(folder) = target.folder() else { return Ok(()) };
    replica.load(&target.name, folder, Load::Fresh).await?;
    let answered = inspect::answers(replica, &target.name).await;
    replica.unload(&target.name).await?;
    answered
}
