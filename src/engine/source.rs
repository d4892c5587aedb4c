//! Where a model comes from: a folder in Hugging Face layout, a `.gguf` file, or a hub id, with or without a revision.

use std::path::{Path, PathBuf};

use candle_core::Tensor;
use hf_hub::api::tokio::ApiError;
use hf_hub::{Cache, Repo, RepoType};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::config::ModelConfig;
use super::error::EngineError;
use super::gguf::Gguf;
use super::held::{Held, Hold};
use super::safetensors::Safetensors;
use crate::durable;

/// The files of a hub repository that a folder needs beside its weights; those marked false may be absent.
const HUB_FILES: [(&str, bool); 5] = [
    ("config.json", true),
    ("tokenizer.json", true),
    ("tokenizer_config.json", false),
    ("generation_config.json", false),
    ("chat_template.jinja", false),
];

/// Weights in one file, and the list of the files of those that are in several.
const ONE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What an operator names as `MODEL`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder with `config.json`, `tokenizer.json` and safetensors weights.
    Folder(PathBuf),
    /// A file that holds everything.
    Gguf(PathBuf),
    /// A repository on the hub, fetched into the user's hub cache.
    Hub(HubId),
}

/// `organisation/name` or `organisation/name@revision`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `organisation/name`.
    pub repository: String,
    /// A branch, a tag or a commit; a commit is the only one that never changes.
    pub revision: Option<String>,
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.repository),
            None => f.write_str(&self.repository),
        }
    }
}

impl ModelSource {
    /// Tells which of the three a text names: an existing folder, a `.gguf` path, or a hub id.
    pub fn parse(model: &str) -> Result<Self, EngineError> {
        let path = Path::new(model);
        let missing = |problem: &str| EngineError::ModelNotFound { model: model.into(), problem: problem.into() };
        let is_gguf = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        if is_gguf && path.is_file() {
            Ok(ModelSource::Gguf(path.to_path_buf()))
        } else if path.is_dir() {
            Ok(ModelSource::Folder(path.to_path_buf()))
        } else if path.is_file() {
            Err(missing("the file does not end in .gguf"))
        } else if let (false, Some(id)) = (is_gguf, HubId::parse(model)) {
            Ok(ModelSource::Hub(id))
        } else {
            Err(missing("no such file or folder"))
        }
    }

    /// Returns the model's files on this machine, fetching them first where the source is a hub id.
    pub(crate) fn resolve(&self) -> Result<Files, EngineError> {
        match self {
            ModelSource::Gguf(path) => Ok(Files { home: path.clone(), weights: WeightFiles::Gguf(Gguf::open(path)?) }),
            ModelSource::Folder(folder) => Files::in_folder(folder),
            ModelSource::Hub(id) => Files::in_folder(&fetch(id)?),
        }
    }

    /// Returns the config of a folder that holds no weights.
    pub(crate) fn bare_config(&self) -> Result<Option<ModelConfig>, EngineError> {
        match self {
            ModelSource::Folder(folder) if ![ONE_FILE, INDEX].iter().any(|name| folder.join(name).exists()) => {
                ModelConfig::from_json(&folder.join("config.json")).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Returns the name recorded for it: the hub id, or the last part of the path.
    pub(crate) fn name(&self) -> String {
        match self {
            ModelSource::Hub(id) => id.to_string(),
            ModelSource::Folder(path) => last_part(&path.canonicalize().unwrap_or_else(|_| path.clone())),
            ModelSource::Gguf(path) => last_part(path),
        }
    }
}

fn last_part(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

impl HubId {
    /// Reads an id with the characters that the hub's have.
    fn parse(text: &str) -> Option<Self> {
        let plain = |part: &str| {
            !part.is_empty()
                && !part.starts_with(['.', '-'])
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let (repository, revision) = match text.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (text, None),
        };
        let (organisation, name) = repository.split_once('/')?;
        let whole = plain(organisation) && plain(name) && revision.is_none_or(|r| r.split('/').all(plain));
        whole.then(|| HubId { repository: repository.into(), revision: revision.map(str::to_string) })
    }
}

/// The files of one model, opened.
pub(crate) struct Files {
    /// The folder, or the GGUF file.
    home: PathBuf,
    weights: WeightFiles,
}

enum WeightFiles {
    Gguf(Gguf),
    Safetensors { files: Vec<PathBuf>, tensors: Safetensors },
}

impl Files {
    fn in_folder(folder: &Path) -> Result<Self, EngineError> {
        let files = Safetensors::files(folder)?;
        if let Some(absent) = files.iter().find(|f| !f.is_file()) {
            return Err(EngineError::ModelNotFound {
                model: folder.display().to_string(),
                problem: format!("{} is not there", absent.display()),
            });
        }
        let tensors = Safetensors::open(&files)?;
        Ok(Files { home: folder.to_path_buf(), weights: WeightFiles::Safetensors { files, tensors } })
    }

    pub(crate) fn config(&self) -> Result<ModelConfig, EngineError> {
        match &self.weights {
            WeightFiles::Gguf(gguf) => gguf.config(),
            WeightFiles::Safetensors { .. } => ModelConfig::from_json(&self.home.join("config.json")),
        }
    }

    /// Returns a tensor by its Hugging Face name.
    pub(crate) fn tensor(&self, name: &str, config: &ModelConfig) -> Result<Option<Tensor>, EngineError> {
        match &self.weights {
            WeightFiles::Gguf(gguf) => gguf.tensor(name, config),
            WeightFiles::Safetensors { tensors, .. } => tensors.tensor(name),
        }
    }

    /// Returns a matrix by its Hugging Face name, held as asked.
    pub(crate) fn held(&self, name: &str, config: &ModelConfig, hold: Hold) -> Result<Option<Held>, EngineError> {
        match (&self.weights, hold) {
            (_, Hold::F32) => Ok(self.tensor(name, config)?.map(Held::from)),
            (WeightFiles::Gguf(gguf), Hold::Stored) => gguf.held(name, config),
            (WeightFiles::Safetensors { tensors, .. }, Hold::Stored) => {
                tensors.stored(name)?.map(|blocks| Held::stored(blocks, None)).transpose()
            }
        }
    }

    /// Returns how many bytes all tensors take in the files.
    pub(crate) fn bytes(&self) -> u64 {
        match &self.weights {
            WeightFiles::Gguf(gguf) => gguf.bytes(),
            WeightFiles::Safetensors { tensors, .. } => tensors.bytes(),
        }
    }

    /// Returns the open GGUF where there is one; a folder keeps its tokenizer in files of its own.
    pub(crate) fn gguf(&self) -> Option<&Gguf> {
        match &self.weights {
            WeightFiles::Gguf(gguf) => Some(gguf),
            WeightFiles::Safetensors { .. } => None,
        }
    }

    /// Returns the folder or the GGUF file, for messages.
    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// Reads a JSON file of the folder; null where it is absent.
    pub(crate) fn json(&self, name: &str) -> Result<Value, EngineError> {
        let path = self.home.join(name);
        match durable::read_json(&path) {
            Ok(value) => Ok(value),
            Err(e) if e.is_not_found() => Ok(Value::Null),
            Err(e) => Err(EngineError::file(&path, e, "download the model again")),
        }
    }

    /// Returns the SHA-256 of the weight file, or that of the hashes of all shards in order.
    pub(crate) fn weights_sha256(&self) -> Result<String, EngineError> {
        let hash = |path: &Path| {
            durable::sha256_file(path).map_err(|e| EngineError::file(path, e, "check the file's permissions"))
        };
        let files = match &self.weights {
            WeightFiles::Gguf(gguf) => return hash(gguf.path()),
            WeightFiles::Safetensors { files, .. } => files,
        };
        let hashes = files.iter().map(|f| hash(f)).collect::<Result<Vec<_>, _>>()?;
        match hashes.as_slice() {
            [one] => Ok(one.clone()),
            many => Ok(hex::encode(Sha256::digest(many.join("\n").as_bytes()))),
        }
    }
}

/// Fetches a hub repository into the user's hub cache and returns its folder there.
fn fetch(id: &HubId) -> Result<PathBuf, EngineError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let fault = |problem: String| EngineError::ModelNotFound { model: id.to_string(), problem };
    let runtime = runtime.map_err(|e| fault(e.to_string()))?;
    // A thread of its own: a caller may already be inside a runtime, where a second one cannot block.
    std::thread::scope(|scope| {
        let fetching = scope.spawn(|| runtime.block_on(fetch_files(id)));
        fetching.join().unwrap_or_else(|_| Err("the download stopped".to_string()))
    })
    .map_err(fault)
}

async fn fetch_files(id: &HubId) -> Result<PathBuf, String> {
    let builder = hf_hub::api::tokio::ApiBuilder::from_env().with_progress(false);
    let name = id.repository.clone();
    let repository = match &id.revision {
        Some(revision) => Repo::with_revision(name, RepoType::Model, revision.clone()),
        None => Repo::model(name),
    };
    let cached = Cache::from_env().repo(repository.clone());
    // The weights come last: where they are, all that there is was fetched before.
    let whole = [ONE_FILE, INDEX].iter().any(|name| cached.get(name).is_some());
    let api = builder.build().map_err(|e| e.to_string())?.repo(repository);
    let fetch = async |name: &str, required: bool| match api.get(name).await {
        Ok(path) => Ok(Some(path)),
        Err(e) if !required && (is_absent(&e) || whole && is_unreachable(&e)) => Ok(None),
        Err(e) => Err(format!("the hub gave no {name}: {e}")),
    };
    let mut folder = None;
    for (name, required) in HUB_FILES {
        let path = fetch(name, required).await?;
        folder = path.and_then(|path| path.parent().map(Path::to_path_buf)).or(folder);
    }
    let folder = folder.ok_or("the hub gave no files")?;
    if fetch(INDEX, false).await?.is_none() {
        fetch(ONE_FILE, true).await?;
    }
    for file in Safetensors::files(&folder).map_err(|e| e.to_string())? {
        fetch(&last_part(&file), true).await?;
    }
    // The folder is named after the commit.
    tracing::info!(model = %id, commit = last_part(&folder), "the hub's files are here");
    Ok(folder)
}

/// Returns true if the hub says that there is no such file.
fn is_absent(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(e) if e.status().is_some_and(|status| status.as_u16() == 404))
}

/// Returns true if the hub says nothing, as without a network.
fn is_unreachable(error: &ApiError) -> bool {
    matches!(error, ApiError::RequestError(e) if e.is_connect() || e.is_timeout())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_names_a_folder_a_file_or_a_hub_id() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, "x").unwrap();
        let parse = |p: &Path| ModelSource::parse(&p.display().to_string());
        assert_eq!(parse(folder.path()).unwrap(), ModelSource::Folder(folder.path().to_path_buf()));
        assert_eq!(parse(&file).unwrap(), ModelSource::Gguf(file));
        let hub = |text: &str| match ModelSource::parse(text) {
            Ok(ModelSource::Hub(id)) => (id.repository, id.revision),
            other => panic!("{text}: {other:?}"),
        };
        assert_eq!(hub("org/name-1.5B"), ("org/name-1.5B".into(), None));
        assert_eq!(hub("org/name@0a1b2c"), ("org/name".into(), Some("0a1b2c".into())));
        assert_eq!(hub("org/name@refs/pr/1"), ("org/name".into(), Some("refs/pr/1".into())));
        assert!(HubId::parse("org/name@").is_none() && HubId::parse("org/name@../x").is_none());
    }

    #[test]
    fn what_is_not_there_is_named_with_the_remedy() {
        for model in ["/no/such/model.gguf", "models/absent.gguf", "./folder", "nonsense"] {
            let error = ModelSource::parse(model).unwrap_err().to_string();
            assert!(error.contains(model) && error.contains("give a folder"), "{error}");
        }
    }
}
