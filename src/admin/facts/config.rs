//! The config in force, with nothing in it that could be a secret.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use super::Facts;

/// The config in force.
#[derive(Debug, Clone, Serialize, JsonSchema)]
pub(in super::super) struct InForce {
    /// SHA-256 of the config, as rows and manifests record it.
    pub(in super::super) hash: String,
    /// Every section with every key.
    pub(in super::super) config: serde_json::Map<String, Value>,
}

/// What stands in the place of a value that is not shown.
const HIDDEN: &str = "(hidden)";

impl Facts {
    /// Returns the config in force.
    pub(in super::super) fn config(&self) -> InForce {
        let now = self.config_now();
        let mut config = serde_json::to_value(now.as_ref()).unwrap_or_default();
        redact("", &mut config);
        InForce { hash: now.hash(), config: config.as_object().cloned().unwrap_or_default() }
    }
}

/// Hides what could be a secret: values under a telling key, and names with passwords in addresses. The config itself holds
/// none by design (a secret is a file's or a variable's), but an operator may have put one where none belongs.
fn redact(key: &str, value: &mut Value) {
    match value {
        Value::Object(map) => map.iter_mut().for_each(|(key, value)| redact(key, value)),
        Value::Array(items) => items.iter_mut().for_each(|item| redact(key, item)),
        Value::String(text) if !text.is_empty() && is_telling(key) => *text = HIDDEN.to_string(),
        Value::String(text) => *text = without_password(text),
        _ => {}
    }
}

fn is_telling(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    let names_a_file = key.ends_with("_file") || key.ends_with("_path");
    let telling = ["password", "secret", "token", "api_key", "apikey", "access_key", "credential", "sas"];
    // `max_tokens`, `stop_tokens` and the like are numbers or lists of another meaning.
    !names_a_file && !key.contains("tokens") && telling.iter().any(|word| key.contains(word))
}

/// Returns an address without the user and password in it, and other text as it is.
fn without_password(text: &str) -> String {
    match url::Url::parse(text) {
        Ok(mut url) if url.has_authority() && (!url.username().is_empty() || url.password().is_some()) => {
            // An address that takes no user has none.
            let (_user, _password) = (url.set_username(""), url.set_password(None));
            url.to_string()
        }
        _ => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_could_be_a_secret_is_hidden_and_nothing_else() {
        let mut config = json!({
            "sasl_password_file": "/run/secrets/p", "store_options": { "access_key_id": "AKIA", "region": "eu" },
            "max_tokens": 24, "urls": ["http://anna:hunter2@10.0.0.5:8000/v1"], "token": "", "api_key": "sk-1",
            "brokers": "broker:9092"
        });
        redact("", &mut config);
        let expected = json!({
            "sasl_password_file": "/run/secrets/p", "store_options": { "access_key_id": HIDDEN, "region": "eu" },
            "max_tokens": 24, "urls": ["http://10.0.0.5:8000/v1"], "token": "", "api_key": HIDDEN, "brokers": "broker:9092"
        });
        assert_eq!(config, expected);
    }
}
