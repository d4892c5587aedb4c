//! Which answers are drawn under a JSON Schema: those of the workloads whose rules ask for one.

use crate::candidates::Formats;
use crate::engine::{EngineError, Grammar, Model};
use crate::rewards::Workload;

/// Returns what the answers of each workload must be, where they are to keep their JSON rules.
pub fn formats(workloads: &[Workload], model: &Model, follow_json_rules: bool) -> Result<Formats, EngineError> {
    let ruled = workloads.iter().filter(|_| follow_json_rules);
    let schemas = ruled.filter_map(|workload| Some((workload.name.clone(), workload.json_schema()?)));
    schemas.map(|(name, schema)| Ok((name, Grammar::json_schema(model, &schema)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dataset::Match;
    use crate::rewards::rules::{Kind, Rule};

    #[test]
    fn a_workload_with_a_json_rule_has_a_grammar_where_it_is_followed() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/models/tiny-llama");
        let model = Model::load(path).unwrap();
        let workload = |name: &str, kind| Workload {
            name: name.into(),
            matching: Match::Name,
            house_rules: String::new(),
            rules: vec![Rule::hard(kind)],
        };
        let schema = Some(r#"{"type": "object", "properties": {"n": {"type": "integer"}}}"#.to_string());
        let all = [
            workload("json", Kind::Json { schema }),
            workload("words", Kind::RequiredWords { words: vec!["a".into()] }),
        ];
        assert!(formats(&all, &model, false).unwrap().is_empty());
        assert_eq!(formats(&all, &model, true).unwrap().keys().collect::<Vec<_>>(), ["json"]);
    }
}
