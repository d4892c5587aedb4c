//! `taod adapters`: the registry, and an operator's own changes of what is served.

mod diff;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, Subcommand};

use super::lines::Output;
use super::{Exit, Global, block_on};
use crate::config::Config;
use crate::daemon::{canary, load_model, promotion};
use crate::endpoint::fleet::Strangers;
use crate::endpoint::promote::Outcome;
use crate::engine::{Adapter, Model};
use crate::registry::{Listed, Registry};
use crate::round::Paths;
use crate::signature::SigningKey;

/// What is asked of the registry.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the registered versions.
    List {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Print everything that is recorded of a version, as JSON.
    Show {
        /// The version; without it the one that is served.
        version: Option<String>,
    },
    /// Tell in what two versions differ: what each was trained on, its settings, and how far its weights lie apart.
    Diff {
        /// The one version.
        from: String,
        /// The other; without it the one that is served.
        to: Option<String>,
    },
    /// Make the adapter that is in production already the first incumbent. That the endpoint answers with it is proven.
    Import {
        /// A PEFT folder.
        folder: PathBuf,
        /// Register it only, and leave what is served as it is.
        #[arg(long)]
        register_only: bool,
        #[command(flatten)]
        why: Why,
    },
    /// Make the key by which versions are signed (registry.signing_key_file), and print its public half for
    /// registry.trusted_keys.
    Keygen {
        /// The file to write; one that is there is left alone.
        file: PathBuf,
    },
    /// Sign versions that are registered already by registry.signing_key_file. That they are what they should be is your word.
    Sign {
        /// The version; without it all that are not signed.
        version: Option<String>,
    },
    /// Compare a version's files with the hashes recorded of them, and its signature with registry.trusted_keys.
    Verify {
        /// The version; without it all of them.
        version: Option<String>,
    },
    /// Write a version in another engine's format; PEFT's is that of its folder.
    Export {
        /// The version, or a PEFT folder.
        version: String,
        /// The file to write: a GGUF for llama.cpp.
        #[arg(long, value_name = "FILE.gguf")]
        out: PathBuf,
        /// The base model; without it that of the config.
        #[arg(long, value_name = "MODEL")]
        model: Option<String>,
    },
    /// Put a version into the endpoint without a verdict of the gate. It is recorded who did it and why.
    Promote {
        /// The version.
        version: String,
        #[command(flatten)]
        why: Why,
    },
    /// Give a version a part of the requests, at a gateway with weights; or end that.
    Canary {
        /// The version.
        #[arg(required_unless_present = "stop", conflicts_with = "stop")]
        version: Option<String>,
        /// Its part of the requests, 1 to 50.
        #[arg(long, default_value_t = 10)]
        percent: u8,
        /// End the canary: all requests go to the served version again.
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        why: Why,
    },
    /// Return to the version served before; the present one is quarantined.
    Rollback {
        #[command(flatten)]
        why: Why,
    },
    /// Settle a change that was interrupted and put the served version on every server, as the daemon does each minute.
    Settle {
        /// Lead the stable name to what is served here also where it leads to a version of another daemon's.
        #[arg(long)]
        take_over: bool,
    },
    /// Make the model of the config the new base: it is served bare, the open trial is void, and adapters of the former
    /// base are refused from now on.
    NewBase {
        #[command(flatten)]
        why: Why,
    },
    /// Never let a version be served again, under whatever name its weights come.
    Quarantine {
        /// The version.
        version: String,
        #[command(flatten)]
        why: Why,
    },
}

/// Who changes something, and why.
#[derive(Debug, Args)]
pub struct Why {
    /// What is recorded as the reason.
    #[arg(long, value_name = "TEXT")]
    pub(super) reason: String,
    /// Who is recorded.
    #[arg(long, env = "USER", value_name = "NAME")]
    pub(super) by: String,
}

impl Why {
    fn signed(&self) -> String {
        format!("{} ({})", self.reason, self.by)
    }
}

pub(super) fn run(global: &Global, command: &Command) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let registry = Registry::open(&Paths::new(&config.state.dir).registry(), &config.registry)?;
    let mut out = Output::stdout();
    match command {
        Command::List { json: true } => out.line(&registry.list()?)?,
        Command::List { json: false } => out.text(&list(&registry.list()?))?,
        Command::Show { version } => {
            let version = match version {
                Some(version) => version.clone(),
                None => registry.current()?.version,
            };
            let listed = registry.list()?.into_iter().find(|listed| listed.version == version);
            let listed = listed
                .with_context(|| format!("version {version} is not registered; `taod adapters list` shows what is"))?;
            out.text(&format!("{}\n", serde_json::to_string_pretty(&listed)?))?;
        }
        Command::Diff { from, to } => {
            let to = to.clone().map_or_else(|| registry.current().map(|current| current.version), Ok)?;
            out.text(&format!("{:#}\n", diff::diff(&registry, from, &to)?))?;
        }
        Command::Import { folder, register_only: true, why } => {
            let version = change(&config, async |model| promotion::register(&config, folder, &why.by, model).await)?;
            out.text(&format!("{version} is registered\n"))?;
        }
        Command::Import { folder, register_only: false, why } => {
            let import = async |model: &Model| promotion::import(&config, folder, &why.by, &why.reason, model).await;
            out.text(&format!("{}\n", change(&config, import)?.explain()))?;
        }
        Command::Settle { take_over } => {
            let strangers = if *take_over { Strangers::Overrule } else { Strangers::Keep };
            out.text(&settle(&config, strangers)?)?
        }
        Command::NewBase { why } => {
            let new_base = async |model: &Model| promotion::new_base(&config, &why.by, &why.reason, model).await;
            out.text(&format!("{}\n", change(&config, new_base)?.explain()))?;
        }
        Command::Verify { version } => {
            let versions = match version {
                Some(version) => vec![version.clone()],
                None => registry.list()?.into_iter().map(|listed| listed.version).collect(),
            };
            for version in versions {
                registry.verify(&version)?;
                let by = registry.signer(&version)?.map_or("nobody signed it".into(), |key| format!("signed by {key}"));
                out.text(&format!("{version}: every file is as it was registered; {by}\n"))?;
            }
        }
        Command::Keygen { file } => {
            let key = SigningKey::generate(file)?;
            out.text(&format!("{key}\n"))?;
        }
        Command::Sign { version } => out.text(&sign(&registry, version.as_deref())?)?,
        Command::Export { version, out: file, model } => {
            ensure!(
                file.extension().is_some_and(|extension| extension == "gguf"),
                "--out {}: its name must end in .gguf, the one format that is written",
                file.display()
            );
            let folder = match Path::new(version).is_dir() {
                true => PathBuf::from(version),
                false => {
                    registry.verify(version)?;
                    registry.path(version)
                }
            };
            let model = Model::load(model.as_deref().unwrap_or(&config.model.path))?;
            Adapter::load(&folder, &model)?.save_gguf(file, model.config())?;
            out.text(&format!("{}\n", file.display()))?;
        }
        Command::Promote { version, why } => {
            let promoted = change(&config, async |model| {
                promotion::override_promote(&config, version, &why.by, &why.reason, model).await
            })?;
            out.text(&format!("{}\n", promoted.explain()))?;
        }
        Command::Canary { version: Some(version), percent, why, .. } => {
            let proofs = change(&config, async |model| {
                canary::begin(&config, version, *percent, &why.by, &why.reason, model).await
            })?;
            out.text(&format!("{version} gets {percent} % of the requests; {}\n", promotion::distances(&proofs)))?;
        }
        Command::Canary { version: None, why, .. } => match block_on(canary::end(&config, None, &why.signed()))?? {
            Some(version) => out.text(&format!("{version} gets no requests any more\n"))?,
            None => out.text("there is no canary\n")?,
        },
        Command::Rollback { why } => {
            let promoted =
                change(&config, async |model| promotion::rollback(&config, None, &why.signed(), model).await)?;
            out.text(&format!("{}\n", promoted.explain()))?;
        }
        Command::Quarantine { version, why } => {
            registry.quarantine(version, &why.signed(), chrono::Utc::now().timestamp_micros())?;
            out.text(&format!("{version} is quarantined\n"))?;
        }
    }
    out.flush()?;
    Ok(Exit::Done)
}

/// Changes what the endpoint serves; the proof needs the base model.
fn change<T>(config: &Config, change: impl AsyncFnOnce(&Model) -> anyhow::Result<T>) -> anyhow::Result<T> {
    block_on(async {
        let model = load_model(config).await?;
        change(&model).await
    })?
}

/// Looks after the endpoint once, and says what had to be done.
fn settle(config: &Config, strangers: Strangers) -> anyhow::Result<String> {
    let tended = block_on(promotion::tend(config, &mut false, strangers))??;
    let tended = tended.context("another process is changing what is served: try again when it has ended")?;
    let mut lines = Vec::new();
    match &tended.settled {
        Some((to, Outcome::Done { .. })) => lines.push(format!("the interrupted change to {to} was completed")),
        Some((to, Outcome::Undone)) => lines.push(format!("the interrupted change to {to} was undone")),
        None => {}
    }
    lines.extend(tended.reconciled.changed.iter().map(|url| format!("{url} has the served version again")));
    lines.extend(
        tended.reconciled.retired.iter().map(|(url, version)| format!("{url} does not hold {version} any more")),
    );
    let failed: Vec<String> = tended.reconciled.failed.iter().map(ToString::to_string).collect();
    ensure!(failed.is_empty(), "{}", [lines, failed].concat().join("; "));
    if lines.is_empty() {
        lines.push("nothing was to be done".into());
    }
    Ok(lines.join("\n") + "\n")
}

/// Signs one version, or all that nobody signed.
fn sign(registry: &Registry, version: Option<&str>) -> anyhow::Result<String> {
    let mut versions = Vec::from_iter(version.map(str::to_owned));
    if version.is_none() {
        for listed in registry.list()? {
            if registry.signer(&listed.version)?.is_none() {
                versions.push(listed.version);
            }
        }
    }
    let signed = |version: String| Ok(format!("{version} is signed by {}\n", registry.sign(&version)?));
    let lines: anyhow::Result<Vec<String>> = versions.into_iter().map(signed).collect();
    Ok(lines?.concat())
}

fn list(versions: &[Listed]) -> String {
    if versions.is_empty() {
        return "no adapter is registered yet\n".into();
    }
    let line = |listed: &Listed| {
        let state = match (&listed.quarantined, listed.served) {
            (Some(reason), _) => format!("quarantined: {reason}"),
            (None, true) => "served".into(),
            (None, false) => String::new(),
        };
        format!("{}  {state}", listed.version).trim_end().to_string() + "\n"
    };
    versions.iter().map(line).collect()
}
