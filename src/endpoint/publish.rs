//! What taod puts where servers look: a folder for each version, and a file that says which versions are wanted.
//!
//! Each change is one rename, so that a watcher sees the old or the new, never a half.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::durable::{self, FileError};

use super::paths::PathMap;
use super::{EndpointError, Settings as Endpoint};

/// The file in the folder that says what is published.
const MANIFEST: &str = "taod.json";

/// What an operator sets of what is published; used where `endpoint.kind` is "directory" or "llamacpp".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Folder to publish in, absolute: each version as a folder of its own (llamacpp: as a .gguf file).
    pub folder: PathBuf,
    /// How a version gets there: "link" (a symbolic link into the registry) or "copy".
    pub how: How,
    /// What copies say they were trained on; vLLM's resolver wants the server's --model, letter by letter. Empty: as
    /// trained.
    pub base_model_path: String,
    /// A file of wanted adapters besides: "none", "gie" (the dynamic-lora sidecar's config) or "kserve" (a patch of an
    /// LLMInferenceService).
    pub list: List,
    /// That file, absolute.
    pub list_path: PathBuf,
    /// Whether a retired version's folder goes, too. NIM unloads it then; vLLM's engine dies of it.
    pub remove: bool,
}

/// How a version gets into the folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum How {
    Link,
    Copy,
}

/// The form of a file of wanted adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum List {
    None,
    Gie,
    Kserve,
}

impl Default for Settings {
    fn default() -> Self {
        let (folder, base_model_path, list_path) = Default::default();
        Settings { folder, how: How::Link, base_model_path, list: List::None, list_path, remove: false }
    }
}

impl Settings {
    /// Checks the values; the message names the key and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        if !self.folder.is_absolute() {
            return Err(format!("folder = {:?}: set it to an absolute path", self.folder.display()));
        }
        if self.list != List::None && !self.list_path.is_absolute() {
            return Err(format!("list_path = {:?}: set it to an absolute path", self.list_path.display()));
        }
        match !self.base_model_path.is_empty() && self.how == How::Link {
            true => Err("base_model_path changes the files: set how = \"copy\"".into()),
            false => Ok(()),
        }
    }
}

/// Publishes versions.
#[derive(Clone)]
pub(super) struct Publisher {
    settings: Settings,
    paths: PathMap,
    base_model: String,
    urls: Vec<String>,
}

/// Published versions, each with the folder of the registry that it came from.
type Published = BTreeMap<String, PathBuf>;

impl Publisher {
    pub(super) fn new(settings: &Endpoint) -> Publisher {
        Publisher {
            settings: settings.publish.clone(),
            paths: PathMap::new(&settings.path_map),
            base_model: settings.base_model.clone(),
            urls: settings.urls.clone(),
        }
    }

    /// Publishes a version and returns where. Safe to repeat.
    pub(super) fn add(&self, name: &str, from: &Path) -> Result<PathBuf, EndpointError> {
        let place = self.settings.folder.join(name);
        if !self.has(name, from) {
            self.put(name, from, &place).map_err(broken)?;
            let mut published = self.read().map_err(broken)?;
            published.insert(name.to_owned(), from.to_owned());
            self.write(&published).map_err(broken)?;
        }
        Ok(place)
    }

    /// Takes a version back; its folder goes only where that was asked for. Safe to repeat.
    pub(super) fn remove(&self, name: &str) -> Result<(), EndpointError> {
        let mut published = self.read().map_err(broken)?;
        published.remove(name);
        self.write(&published).map_err(broken)?;
        let place = self.settings.folder.join(name);
        if self.settings.remove && place.symlink_metadata().is_ok() {
            let gone = if place.is_symlink() { fs::remove_file(&place) } else { fs::remove_dir_all(&place) };
            gone.map_err(|e| broken(FileError::io("cannot remove", &place, e)))?;
        }
        Ok(())
    }

    pub(super) fn has(&self, name: &str, from: &Path) -> bool {
        let published = self.read().unwrap_or_default();
        published.get(name).is_some_and(|known| known == from) && self.settings.folder.join(name).is_dir()
    }

    pub(super) fn names(&self) -> Result<Vec<String>, EndpointError> {
        Ok(self.read().map_err(broken)?.into_keys().collect())
    }

    /// Makes the folder under another name and renames it: nobody sees a half.
    fn put(&self, name: &str, from: &Path, place: &Path) -> Result<(), FileError> {
        // What came by a rename is whole, and a version's name tells its content: a copy that was left is as good.
        let weights = |folder: &Path| durable::sha256_file(&folder.join("adapter_model.safetensors"));
        if self.settings.how == How::Copy && !place.is_symlink() && place.is_dir() && weights(place)? == weights(from)?
        {
            return Ok(());
        }
        durable::create_folder(&self.settings.folder)?;
        let half = self.settings.folder.join(format!(".{name}.half"));
        let io = |what| move |e| FileError::io(what, &self.settings.folder, e);
        if half.symlink_metadata().is_ok() {
            let gone = if half.is_symlink() { fs::remove_file(&half) } else { fs::remove_dir_all(&half) };
            gone.map_err(io("cannot clean"))?;
        }
        match self.settings.how {
            How::Link => std::os::unix::fs::symlink(from, &half).map_err(io("cannot link in"))?,
            How::Copy => self.copy(from, &half)?,
        }
        // A folder cannot be renamed over another one, and one that is there is of another making.
        if place.is_dir() && !place.is_symlink() {
            let bak =
                FileError::io("cannot publish in", place, std::io::Error::other("it is there already: remove it"));
            return Err(bak);
        }
        fs::rename(&half, place).map_err(io("cannot rename in"))?;
        durable::sync_folder(&self.settings.folder)
    }

    fn copy(&self, from: &Path, to: &Path) -> Result<(), FileError> {
        durable::create_folder(to)?;
        let weights =
            fs::read(from.join("adapter_model.safetensors")).map_err(|e| FileError::io("cannot read", from, e))?;
        durable::write(&to.join("adapter_model.safetensors"), &weights)?;
        let mut config: Value = durable::read_json(&from.join("adapter_config.json"))?;
        if !self.settings.base_model_path.is_empty() {
            config["base_model_name_or_path"] = self.settings.base_model_path.as_str().into();
        }
        durable::write_json(&to.join("adapter_config.json"), &config)?;
        // A copy is for the server as what is in the registry is.
        durable::admit_group(to, 0o050)?;
        ["adapter_model.safetensors", "adapter_config.json"]
            .iter()
            .try_for_each(|name| durable::admit_group(&to.join(name), 0o040))
    }

    fn read(&self) -> Result<Published, FileError> {
        match durable::read_json(&self.settings.folder.join(MANIFEST)) {
            Err(error) if error.is_not_found() => Ok(Published::new()),
            result => result,
        }
    }

    fn write(&self, published: &Published) -> Result<(), FileError> {
        durable::write_json(&self.settings.folder.join(MANIFEST), published)?;
        match self.settings.list {
            List::None => Ok(()),
            List::Gie => durable::write_json(&self.settings.list_path, &self.sidecar(published)),
            List::Kserve => durable::write_json(&self.settings.list_path, &self.kserve(published)),
        }
    }

    /// The config of GIE's dynamic-lora sidecar (JSON is YAML): what has to be loaded from where.
    fn sidecar(&self, published: &Published) -> Value {
        let first = self.urls.first().and_then(|url| url::Url::parse(url).ok());
        let host = first.as_ref().and_then(|url| url.host_str()).unwrap_or("localhost");
        let port = first.as_ref().and_then(url::Url::port_or_known_default).unwrap_or(8000);
        let model = |name: &String| json!({ "id": name, "source": self.seen(name), "base-model": self.base_model });
        json!({ "vLLMLoRAConfig": {
            "host": host, "port": port, "defaultBaseModel": self.base_model,
            "ensureExist": { "models": published.keys().map(model).collect::<Vec<_>>() },
        } })
    }

    /// A merge patch of an LLMInferenceService.
    fn kserve(&self, published: &Published) -> Value {
        let adapter = |name: &String| json!({ "name": name, "uri": format!("file://{}", self.seen(name)) });
        json!({ "spec": { "model": { "lora": { "adapters": published.keys().map(adapter).collect::<Vec<_>>() } } } })
    }

    fn seen(&self, name: &str) -> String {
        self.paths.seen(&self.settings.folder.join(name))
    }
}

fn broken(error: FileError) -> EndpointError {
    EndpointError::Publish(error)
}
