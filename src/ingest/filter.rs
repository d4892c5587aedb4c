//! Which calls of a log that several endpoints share belong to this one.

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::record::Kind;

/// Choice of calls, by regular expressions that each match a whole name. An empty list chooses all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    /// Models whose calls are stored, as regular expressions for the whole name, such as `llama-3.*`. Empty: all.
    pub models: Vec<String>,
    /// Workloads whose calls are stored, likewise; a call whose log names no workload has the empty name. Empty: all.
    pub workloads: Vec<String>,
}

/// A filter that is ready to be used.
#[derive(Debug, Clone, Default)]
pub(super) struct Choice {
    models: Vec<Regex>,
    workloads: Vec<Regex>,
}

impl Filter {
    /// Makes the expressions ready; says which one is none.
    pub(super) fn compile(&self) -> Result<Choice, String> {
        let of = |key: &str, list: &[String]| -> Result<Vec<Regex>, String> {
            let whole = |text: &String| {
                let name = format!("{key} holds {text:?}, which is no regular expression");
                Regex::new(&format!("^(?:{text})$")).map_err(|e| format!("{name}: {}", last_line(&e)))
            };
            list.iter().map(whole).collect()
        };
        Ok(Choice { models: of("models", &self.models)?, workloads: of("workloads", &self.workloads)? })
    }
}

/// Returns what is wrong with an expression without the drawing of where it is.
fn last_line(error: &regex::Error) -> String {
    error.to_string().lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

impl Choice {
    /// Returns true where a call belongs here. Feedback names neither model nor workload: it is kept, and finds its call
    /// when a dataset is frozen, or does not.
    pub(super) fn takes(&self, kind: Kind, model: Option<&str>, workload: Option<&str>) -> bool {
        let fits = |list: &[Regex], name: Option<&str>| {
            list.is_empty() || list.iter().any(|e| e.is_match(name.unwrap_or_default()))
        };
        kind == Kind::Feedback || (fits(&self.models, model) && fits(&self.workloads, workload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn takes(choice: &Choice, model: Option<&str>, workload: Option<&str>) -> bool {
        choice.takes(Kind::Call, model, workload)
    }

    #[test]
    fn a_name_is_matched_whole_and_an_empty_list_takes_all() {
        let filter = Filter { models: vec!["llama-3.*".into(), "qwen".into()], workloads: Vec::new() };
        let choice = filter.compile().unwrap();
        assert!(takes(&choice, Some("llama-3-8b"), None) && takes(&choice, Some("qwen"), Some("x")));
        assert!(!takes(&choice, Some("qwen2"), None) && !takes(&choice, None, None));
        assert!(takes(&Choice::default(), None, None));
    }

    #[test]
    fn both_must_fit_and_a_call_without_a_workload_has_the_empty_name() {
        let filter = Filter { models: vec!["m".into()], workloads: vec!["support|".into()] };
        let choice = filter.compile().unwrap();
        assert!(takes(&choice, Some("m"), Some("support")) && takes(&choice, Some("m"), None));
        assert!(!takes(&choice, Some("m"), Some("legal")) && !takes(&choice, Some("n"), Some("support")));
    }

    #[test]
    fn feedback_is_kept_and_a_broken_expression_is_named() {
        let filter = Filter { models: vec!["m".into()], ..Filter::default() };
        assert!(filter.compile().unwrap().takes(Kind::Feedback, None, None));
        let error = Filter { workloads: vec!["(".into()], ..Filter::default() }.compile().unwrap_err();
        assert!(error.starts_with("workloads holds \"(\"") && error.contains("unclosed"), "{error}");
    }
}
