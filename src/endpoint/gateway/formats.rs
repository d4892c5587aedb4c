//! The files by which three gateways are told where the stable name leads.
//!
//! LiteLLM reads the file through `include` in its config, TensorZero through a glob of its config files, and of llm-d
//! (Gateway API Inference Extension) it is an `InferenceModelRewrite` for `kubectl apply`. JSON is YAML, so two of them are written as
//! JSON. What is not of the form that [`write()`] makes is not read: it is somebody else's.

use serde_json::{Value, json};

use super::Kind;

/// A version that gets a part of the requests beside the one that the stable name leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canary {
    pub name: String,
    /// Of the requests, 1 to 50.
    pub percent: u8,
}

/// What a file says besides the version.
pub(super) struct Route {
    pub(super) stable_name: String,
    pub(super) urls: Vec<String>,
    pub(super) pool: String,
}

/// Returns the file that leads the stable name to `target`, but for a canary's part. TensorZero's models have no weights.
pub(super) fn write(kind: Kind, route: &Route, target: &str, canary: Option<&Canary>) -> String {
    let mut shares = vec![(target, 100 - canary.map_or(0, |canary| canary.percent))];
    shares.extend(canary.map(|canary| (canary.name.as_str(), canary.percent)));
    let value = match kind {
        Kind::Litellm => litellm(route, &shares),
        Kind::LlmD | Kind::Webhook => rewrite(route, &shares),
        Kind::Tensorzero => return tensorzero(route, target),
    };
    format!("{value:#}\n")
}

/// Returns the version that a file leads to, if [`write()`] made it.
pub(super) fn read(kind: Kind, text: &str) -> Option<String> {
    let name = match kind {
        Kind::Tensorzero => {
            let value: toml::Value = toml::from_str(text).ok()?;
            let providers = value.get("models")?.as_table()?.values().next()?.get("providers")?.as_table()?;
            return Some(providers.values().next()?.get("model_name")?.as_str()?.to_owned());
        }
        Kind::Litellm => {
            let value: Value = serde_json::from_str(text).ok()?;
            value["model_list"][0]["litellm_params"]["model"].as_str()?.strip_prefix(PROVIDER)?.to_owned()
        }
        Kind::LlmD | Kind::Webhook => {
            let value: Value = serde_json::from_str(text).ok()?;
            value["spec"]["rules"][0]["targets"][0]["modelRewrite"].as_str()?.to_owned()
        }
    };
    Some(name)
}

/// LiteLLM's name of an OpenAI-compatible server that needs no key.
const PROVIDER: &str = "hosted_vllm/";

/// One deployment for each version and replica; LiteLLM picks among those of one name by their weights.
fn litellm(route: &Route, shares: &[(&str, u8)]) -> Value {
    let deployment = |name: &str, weight: u8, (index, url): (usize, &String)| {
        json!({
            "model_name": route.stable_name,
            "litellm_params": {
                "model": format!("{PROVIDER}{name}"), "api_base": format!("{}/v1", bare(url)), "weight": weight,
            },
            "model_info": { "id": format!("{name}-{index}") },
        })
    };
    let of = |(name, weight): &(&str, u8)| {
        route.urls.iter().enumerate().map(|replica| deployment(name, *weight, replica)).collect::<Vec<_>>()
    };
    json!({ "model_list": shares.iter().flat_map(of).collect::<Vec<_>>() })
}

/// One provider for each replica, tried in this order.
fn tensorzero(route: &Route, target: &str) -> String {
    let text = |text: &str| toml::Value::String(text.to_owned()).to_string();
    let names: Vec<String> = (0..route.urls.len()).map(|index| format!("replica-{index}")).collect();
    let model = format!("models.{}", text(&route.stable_name));
    let routing: Vec<String> = names.iter().map(|name| text(name)).collect();
    let mut file = format!("[{model}]\nrouting = [{}]\n", routing.join(", "));
    for (name, url) in names.iter().zip(&route.urls) {
        let base = text(&format!("{}/v1/", bare(url)));
        file += &format!(
            "\n[{model}.providers.{name}]\ntype = \"vllm\"\nmodel_name = {}\napi_base = {base}\n\
             api_key_location = \"none\"\n",
            text(target)
        );
    }
    file
}

/// Requests for the stable name are rewritten to a version's, in one pool, by weights.
fn rewrite(route: &Route, shares: &[(&str, u8)]) -> Value {
    let target = |(name, weight): &(&str, u8)| json!({ "modelRewrite": name, "weight": weight });
    json!({
        "apiVersion": "inference.networking.x-k8s.io/v1alpha2",
        "kind": "InferenceModelRewrite",
        "metadata": { "name": format!("taod-{}", label(&route.stable_name)) },
        "spec": {
            "poolRef": { "group": "inference.networking.k8s.io", "name": route.pool },
            "rules": [{
                "matches": [{ "model": { "type": "Exact", "value": route.stable_name } }],
                "targets": shares.iter().map(target).collect::<Vec<_>>(),
            }],
        },
    })
}

fn bare(url: &str) -> &str {
    url.trim_end_matches('/')
}

/// Returns a name that Kubernetes takes for an object.
fn label(name: &str) -> String {
    let kept = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    name.chars().map(kept).collect::<String>().trim_matches('-').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route() -> Route {
        let urls = vec!["http://a:8000/".to_owned(), "http://b:8000".to_owned()];
        Route { stable_name: "Pro duction".into(), urls, pool: "pool".into() }
    }

    #[test]
    fn what_is_written_is_read_and_what_is_foreign_is_not() {
        for kind in [Kind::Litellm, Kind::Tensorzero, Kind::LlmD] {
            let text = write(kind, &route(), "taod-0123456789ab", None);
            assert_eq!(read(kind, &text).as_deref(), Some("taod-0123456789ab"), "{text}");
            for foreign in ["", "{}", "model_list: []", "[models]"] {
                assert_eq!(read(kind, foreign), None, "{foreign}");
            }
        }
    }

    #[test]
    fn a_canary_gets_its_weight_and_the_name_still_leads_to_the_other() {
        let canary = Canary { name: "v2".into(), percent: 10 };
        let text = write(Kind::Litellm, &route(), "v1", Some(&canary));
        assert_eq!(read(Kind::Litellm, &text).as_deref(), Some("v1"));
        let value: Value = serde_json::from_str(&text).unwrap();
        let weights: Vec<Value> = (0..4).map(|i| value["model_list"][i]["litellm_params"]["weight"].clone()).collect();
        assert_eq!(weights, [90, 90, 10, 10]);
        let value: Value = serde_json::from_str(&write(Kind::LlmD, &route(), "v1", Some(&canary))).unwrap();
        let targets = &value["spec"]["rules"][0]["targets"];
        assert_eq!(targets, &json!([{"modelRewrite": "v1", "weight": 90}, {"modelRewrite": "v2", "weight": 10}]));
    }

    #[test]
    fn each_replica_is_named_in_the_form_of_the_gateway() {
        let value: Value = serde_json::from_str(&write(Kind::Litellm, &route(), "v1", None)).unwrap();
        let bases: Vec<&Value> = [0, 1].map(|i| &value["model_list"][i]["litellm_params"]["api_base"]).to_vec();
        assert_eq!(bases, [&json!("http://a:8000/v1"), &json!("http://b:8000/v1")]);
        let value: toml::Value = toml::from_str(&write(Kind::Tensorzero, &route(), "v1", None)).unwrap();
        let model = &value["models"]["Pro duction"];
        assert_eq!(model["routing"].as_array().unwrap().len(), 2);
        assert_eq!(model["providers"]["replica-1"]["api_base"].as_str(), Some("http://b:8000/v1/"));
        let value: Value = serde_json::from_str(&write(Kind::LlmD, &route(), "v1", None)).unwrap();
        assert_eq!(value["metadata"]["name"], "taod-pro-duction");
        assert_eq!(value["spec"]["rules"][0]["matches"][0]["model"]["value"], "Pro duction");
    }
}
