//! The names that can be asked for: the base model, the loaded adapters, and aliases that point at either.
//!
//! Statuses and messages of loading and unloading are vLLM's, so that one driver serves both. Aliases are ours: the
//! stable name that clients use is moved by compare-and-set, so that two writers cannot both believe they won.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use axum::http::StatusCode;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::api::ApiError;
use crate::registry;
use crate::signature::PublicKey;

/// Body of `POST /v1/load_lora_adapter`.
#[derive(Debug, Deserialize)]
pub(crate) struct LoadRequest {
    pub(crate) lora_name: String,
    pub(crate) lora_path: String,
    #[serde(default)]
    pub(crate) load_inplace: bool,
}

/// Body of `POST /v1/unload_lora_adapter`.
#[derive(Debug, Deserialize)]
pub(crate) struct UnloadRequest {
    pub(crate) lora_name: String,
}

/// Body of `PUT /v1/aliases/{name}`. `expected` must be present: null says that the alias must not exist yet.
#[derive(Debug, Deserialize)]
pub(crate) struct AliasRequest {
    pub(crate) target: String,
    #[serde(deserialize_with = "present")]
    pub(crate) expected: Option<String>,
}

/// Reads an `Option` whose key must be there, even if its value is null.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    Option::deserialize(deserializer)
}

/// What a requested name stands for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Resolved {
    /// Name of the base or of the adapter, aliases resolved.
    pub(crate) served: String,
    /// The adapter to answer with; `None` for the base.
    pub(crate) adapter: Option<String>,
}

/// Everything that a request's `model` may name.
pub(crate) struct Names {
    base: String,
    base_root: String,
    context: usize,
    created: i64,
    /// Loaded adapters with the path they came from.
    adapters: BTreeMap<String, String>,
    aliases: BTreeMap<String, String>,
}

impl Names {
    /// Returns the names of a server that has only its base model.
    pub(crate) fn new(base: &str, base_root: &str, context: usize, created: i64) -> Self {
        let (adapters, aliases) = Default::default();
        Names { base: base.to_owned(), base_root: base_root.to_owned(), context, created, adapters, aliases }
    }

    /// Finds what `requested` stands for; without a name it is the base, as in vLLM.
    pub(crate) fn resolve(&self, requested: Option<&str>) -> Result<Resolved, ApiError> {
        let requested = requested.unwrap_or(&self.base);
        let served = self.aliases.get(requested).map_or(requested, String::as_str);
        if served == self.base {
            return Ok(Resolved { served: served.to_owned(), adapter: None });
        }
        if self.adapters.contains_key(served) {
            return Ok(Resolved { served: served.to_owned(), adapter: Some(served.to_owned()) });
        }
        let message = format!("The model `{requested}` does not exist. Valid aliases: {}.", self.base);
        Err(ApiError { param: Some("model"), ..ApiError::not_found(message) })
    }

    /// Says whether `request` may be tried: the checks that vLLM makes before it touches the engine.
    pub(crate) fn check_load(&self, request: &LoadRequest, max_adapters: usize) -> Result<(), ApiError> {
        let name = &request.lora_name;
        if name.is_empty() || request.lora_path.is_empty() {
            return Err(ApiError::user_input("Both 'lora_name' and 'lora_path' must be provided."));
        }
        if *name == self.base {
            let message = format!("The lora adapter '{name}' conflicts with a served base model.");
            return Err(ApiError::user_input(message));
        }
        if self.aliases.contains_key(name) {
            return Err(ApiError::user_input(format!("The lora adapter '{name}' conflicts with an alias.")));
        }
        if self.adapters.contains_key(name) && !request.load_inplace {
            let message = format!(
                "The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set \
                 'load_inplace' to True."
            );
            return Err(ApiError::user_input(message));
        }
        if !self.adapters.contains_key(name) && self.adapters.len() >= max_adapters {
            let message = format!("{max_adapters} adapters are loaded, the most that may be; unload one first");
            return Err(ApiError::user_input(message));
        }
        Ok(())
    }

    /// Records a loaded adapter.
    pub(crate) fn loaded(&mut self, request: &LoadRequest) {
        self.adapters.insert(request.lora_name.clone(), request.lora_path.clone());
    }

    /// Forgets an adapter; one that an alias points at stays, because clients would lose their stable name.
    pub(crate) fn unload(&mut self, name: &str) -> Result<(), ApiError> {
        if name.is_empty() {
            return Err(ApiError::user_input("'lora_name' needs to be provided to unload a LoRA adapter."));
        }
        if let Some((alias, _)) = self.aliases.iter().find(|(_, target)| *target == name) {
            return Err(ApiError::conflict(format!("the alias '{alias}' points at '{name}'; move the alias first")));
        }
        match self.adapters.remove(name) {
            Some(_) => Ok(()),
            None => Err(ApiError::not_found(format!("The lora adapter '{name}' cannot be found."))),
        }
    }

    /// Points alias `name` at `request.target` if it now points at what the caller expects; returns the body to answer.
    pub(crate) fn set_alias(&mut self, name: &str, request: &AliasRequest) -> Result<Value, ApiError> {
        let target = &request.target;
        if name == self.base || self.adapters.contains_key(name) {
            return Err(ApiError::bad(format!("'{name}' is the name of a model; choose another alias"), Some("name")));
        }
        if *target != self.base && !self.adapters.contains_key(target) {
            let message = format!("The model `{target}` does not exist. Valid aliases: {}.", self.base);
            return Err(ApiError { param: Some("target"), ..ApiError::not_found(message) });
        }
        let current = self.aliases.get(name);
        if current != request.expected.as_ref() {
            let show = |value: Option<&String>| value.map_or("nothing".to_owned(), |v| format!("'{v}'"));
            let (current, expected) = (show(current), show(request.expected.as_ref()));
            let message = format!("the alias '{name}' points at {current}, not at {expected}; read it and try again");
            return Err(ApiError { param: Some("expected"), ..ApiError::conflict(message) });
        }
        let previous = self.aliases.insert(name.to_owned(), target.clone());
        Ok(json!({"name": name, "target": target, "previous": previous}))
    }

    /// Returns the body of `GET /v1/aliases`.
    pub(crate) fn alias_list(&self) -> Value {
        let card = |(name, target): (&String, &String)| json!({"name": name, "target": target});
        json!({"object": "list", "data": self.aliases.iter().map(card).collect::<Vec<_>>()})
    }

    /// Returns the body of `GET /v1/models`: the base and the adapters with their paths, as vLLM lists them.
    pub(crate) fn model_list(&self) -> Value {
        let card = |id: &str, root: &str, parent: Option<&str>, context: Option<usize>| {
            json!({"id": id, "object": "model", "created": self.created, "owned_by": "taod", "root": root,
                "parent": parent, "max_model_len": context})
        };
        let mut cards = vec![card(&self.base, &self.base_root, None, Some(self.context))];
        cards.extend(self.adapters.iter().map(|(name, path)| card(name, path, Some(&self.base), None)));
        json!({"object": "list", "data": cards})
    }
}

/// Returns the folder to load, if `path` lies below `root`.
///
/// A path outside is refused without looking at it (a caller must not learn what exists there), and one inside is
/// checked again after its symbolic links are resolved.
pub(crate) fn folder_below(root: &Path, name: &str, path: &str) -> Result<PathBuf, ApiError> {
    let missing = format!("Loading lora {name} failed: No adapter found for {path}");
    let outside = || {
        let root = root.display();
        ApiError::not_found(format!("{missing} (this server loads adapters only from below {root})"))
    };
    let asked = Path::new(path);
    if !asked.starts_with(root) || asked.components().any(|part| part == Component::ParentDir) {
        return Err(outside());
    }
    let (Ok(real), Ok(real_root)) = (asked.canonicalize(), root.canonicalize()) else {
        return Err(ApiError::not_found(missing));
    };
    if !real.starts_with(&real_root) {
        return Err(outside());
    }
    match real.join("adapter_config.json").is_file() {
        true => Ok(real),
        false => Err(ApiError::not_found(missing)),
    }
}

/// Refuses a folder whose files no trusted key signed, or which holds another version than the one that is asked for by name or
/// path; where no key is trusted, nothing is asked for. Reads all of the adapter.
pub(crate) fn check_signed(keys: &[String], folder: &Path, name: &str, path: &str) -> Result<(), ApiError> {
    if keys.is_empty() {
        return Ok(());
    }
    let refuse = |why: String| ApiError::user_input(format!("Loading lora {name} failed: {why}"));
    let trusted = PublicKey::parse_all(keys).map_err(|error| refuse(error.to_string()))?;
    let last = Path::new(path).file_name().and_then(|last| last.to_str()).unwrap_or_default();
    registry::check_folder(folder, &[name, last], &trusted).map_err(|error| refuse(error.to_string()))
}

/// Words a failure inside the engine as vLLM does: a 500, not a 400, although the adapter is at fault.
pub(crate) fn worker_failed(reason: &str) -> ApiError {
    let message = format!("Call to add_lora method failed: Worker failed with error '{reason}'");
    ApiError { status: StatusCode::INTERNAL_SERVER_ERROR, ..ApiError::internal(message) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let mut names = Names::new("base", "/models/base", 512, 0);
        for name in ["v1", "v2"] {
            let path = format!("/adapters/{name}");
            names.loaded(&LoadRequest { lora_name: name.into(), lora_path: path, load_inplace: false });
        }
        names
    }

    fn alias(target: &str, expected: Option<&str>) -> AliasRequest {
        AliasRequest { target: target.into(), expected: expected.map(str::to_owned) }
    }

    #[test]
    fn an_alias_moves_only_from_the_expected_target() {
        let mut names = names();
        names.set_alias("prod", &alias("base", None)).unwrap();
        assert_eq!(names.set_alias("prod", &alias("v1", None)).unwrap_err().status, StatusCode::CONFLICT);
        assert_eq!(names.set_alias("prod", &alias("v2", Some("v1"))).unwrap_err().status, StatusCode::CONFLICT);
        assert_eq!(names.resolve(Some("prod")).unwrap().adapter, None);
        let moved = names.set_alias("prod", &alias("v1", Some("base"))).unwrap();
        assert_eq!(moved, json!({"name": "prod", "target": "v1", "previous": "base"}));
        assert_eq!(names.resolve(Some("prod")).unwrap(), names.resolve(Some("v1")).unwrap());
    }

    #[test]
    fn an_alias_needs_a_free_name_and_a_target_that_exists() {
        let mut names = names();
        assert_eq!(names.set_alias("v1", &alias("v2", None)).unwrap_err().status, StatusCode::BAD_REQUEST);
        assert_eq!(names.set_alias("prod", &alias("v3", None)).unwrap_err().status, StatusCode::NOT_FOUND);
        assert!(serde_json::from_str::<AliasRequest>(r#"{"target":"v1"}"#).is_err(), "'expected' must be present");
        assert!(serde_json::from_str::<AliasRequest>(r#"{"target":"v1","expected":null}"#).is_ok());
    }

    #[test]
    fn an_adapter_under_an_alias_cannot_be_unloaded() {
        let mut names = names();
        names.set_alias("prod", &alias("v1", None)).unwrap();
        assert_eq!(names.unload("v1").unwrap_err().status, StatusCode::CONFLICT);
        names.set_alias("prod", &alias("v2", Some("v1"))).unwrap();
        names.unload("v1").unwrap();
    }

    #[test]
    fn adapters_come_only_from_below_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let (root, elsewhere) = (folder.path().join("root"), folder.path().join("elsewhere"));
        for place in [root.join("a"), elsewhere.clone()] {
            std::fs::create_dir_all(&place).unwrap();
            std::fs::write(place.join("adapter_config.json"), "{}").unwrap();
        }
        std::os::unix::fs::symlink(&elsewhere, root.join("link")).unwrap();
        assert!(folder_below(&root, "x", root.join("a").to_str().unwrap()).is_ok());
        let refused = [root.join("../elsewhere"), elsewhere, root.join("link"), PathBuf::from("relative")];
        for path in refused {
            let error = folder_below(&root, "x", path.to_str().unwrap()).unwrap_err();
            assert!(error.message.contains("only from below"), "{path:?}: {error:?}");
        }
        let error = folder_below(&root, "x", root.join("b").to_str().unwrap()).unwrap_err();
        assert!(error.message.ends_with("/b") && error.status == StatusCode::NOT_FOUND, "{error:?}");
    }
}
