//! Workloads: the kinds of traffic that an operator names, each with its house rules and its checks.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::RewardError;
use super::rules::{Check, Kind, Rule};
use crate::dataset::{MOST_WORKLOADS as MOST, Match, WorkloadView};
use crate::json::Value;
use crate::record::Message;

/// One `[[workload]]` of the config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// Name of the workload, unique.
    pub name: String,
    /// How a logged call is assigned to this workload.
    #[serde(default, rename = "match")]
    pub matching: Match,
    /// The text that every prompt of this workload carries besides the question, word for word. It is taken out before
    /// prompts are compared, before similarity and before the quality guardrail. Empty = there is none.
    #[serde(default)]
    pub house_rules: String,
    /// What a good answer looks like. Prompts of a workload without rules are left out of training and of the gate,
    /// with the reason `no_rules`.
    #[serde(default)]
    pub rules: Vec<Rule>,
}

impl Workload {
    /// Returns the JSON Schema that the rules ask for: of any JSON value where a `json` rule has none; nothing without such a
    /// rule. A schema that is not JSON is refused when the rules are compiled.
    pub fn json_schema(&self) -> Option<serde_json::Value> {
        self.rules.iter().find_map(|rule| match &rule.kind {
            Kind::Json { schema } => serde_json::from_str(schema.as_deref().unwrap_or("{}")).ok(),
            _ => None,
        })
    }

    /// Returns what a dataset needs to know of the workload.
    pub fn view(&self) -> WorkloadView {
        WorkloadView {
            name: self.name.clone(),
            matching: self.matching.clone(),
            house_rules: self.house_rules.clone(),
            has_rules: !self.rules.is_empty(),
        }
    }

    /// Returns the text without the house rules and without the white space that stood around them.
    pub fn without_house_rules(&self, text: &str) -> String {
        let house_rules = self.house_rules.trim();
        if house_rules.is_empty() || !text.contains(house_rules) {
            return text.to_owned();
        }
        let pieces: Vec<&str> = text.split(house_rules).map(str::trim).filter(|piece| !piece.is_empty()).collect();
        pieces.join("\n\n")
    }

    /// Returns the messages without the house rules. A system message that held nothing else is left out; other turns
    /// stay, though empty, since a chat template may insist on them.
    pub fn strip(&self, messages: &[Message]) -> Vec<Message> {
        let strip = |message: &Message| {
            let mut message = message.clone();
            let before = message.plain_text();
            match &mut message.content {
                Value::String(text) => *text = self.without_house_rules(text),
                Value::Array(parts) => parts.iter_mut().for_each(|part| self.strip_part(part)),
                _ => {}
            }
            let emptied = message.role == "system" && !before.is_empty() && message.plain_text().trim().is_empty();
            (!emptied).then_some(message)
        };
        messages.iter().filter_map(strip).collect()
    }

    fn strip_part(&self, part: &mut Value) {
        if let Some(Value::String(text)) = part.get_mut("text") {
            *text = self.without_house_rules(text);
        }
    }
}

/// A rule ready to score, under the name that its scores carry.
#[derive(Debug)]
pub struct NamedCheck {
    /// `rules/length`, or `rules/length_2` for the second of its kind.
    pub part: String,
    pub hard: bool,
    pub check: Check,
}

/// The workloads of a config with their rules compiled.
#[derive(Debug)]
pub struct Workloads(Vec<(Workload, Vec<NamedCheck>)>);

impl Workloads {
    /// Compiles all rules; an error names the workload, the rule's place and what to do.
    pub fn compile(workloads: &[Workload]) -> Result<Self, RewardError> {
        let mut compiled: Vec<(Workload, Vec<NamedCheck>)> = Vec::with_capacity(workloads.len());
        for workload in workloads {
            let name = &workload.name;
            if name.trim().is_empty() {
                return Err(RewardError::Workload { name: name.clone(), reason: "the name is blank; give one".into() });
            }
            if compiled.iter().any(|(other, _)| other.name == *name) {
                let reason = "it is defined twice; rename or remove one".into();
                return Err(RewardError::Workload { name: name.clone(), reason });
            }
            if let Err(reason) = workload.matching.validate() {
                return Err(RewardError::Workload { name: name.clone(), reason: format!("match: {reason}") });
            }
            if compiled.len() == MOST {
                let reason = format!("it is one more than the {MOST} that there may be; join some");
                return Err(RewardError::Workload { name: name.clone(), reason });
            }
            compiled.push((workload.clone(), compile_rules(workload)?));
        }
        Ok(Workloads(compiled))
    }

    /// Returns the workload of this name, and its rules. Which workload a logged call is of, a dataset has decided.
    pub fn find(&self, name: Option<&str>) -> Option<(&Workload, &[NamedCheck])> {
        let found = self.0.iter().find(|(workload, _)| name == Some(workload.name.as_str()))?;
        Some((&found.0, &found.1))
    }

    /// Yields the workloads as configured.
    pub fn iter(&self) -> impl Iterator<Item = &Workload> {
        self.0.iter().map(|(workload, _)| workload)
    }
}

fn compile_rules(workload: &Workload) -> Result<Vec<NamedCheck>, RewardError> {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    let mut checks = Vec::with_capacity(workload.rules.len());
    for (index, rule) in workload.rules.iter().enumerate() {
        let kind = rule.kind.name();
        let check = rule.compile().map_err(|reason| RewardError::Rule {
            workload: workload.name.clone(),
            index,
            kind,
            reason,
        })?;
        let nth = seen.entry(kind).or_default();
        *nth += 1;
        let part = if *nth == 1 { format!("rules/{kind}") } else { format!("rules/{kind}_{nth}") };
        checks.push(NamedCheck { part, hard: rule.hard, check });
    }
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(toml: &str) -> Workload {
        toml::from_str(toml).unwrap()
    }

    #[test]
    fn house_rules_leave_without_a_trace() {
        let short = workload("name = 'short'\nhouse_rules = 'Answer in one line.'");
        assert_eq!(short.without_house_rules("What is tea?\n\nAnswer in one line."), "What is tea?");
        assert_eq!(
            short.without_house_rules("Answer in one line.\nTea?\n\nAnswer in one line. Please."),
            "Tea?\n\nPlease."
        );
        assert_eq!(short.without_house_rules(" as it is "), " as it is ");
        assert_eq!(workload("name = 'free'").without_house_rules(" as it is "), " as it is ");
    }

    #[test]
    fn messages_lose_the_house_rules_wherever_they_stand() {
        let short = workload("name = 'short'\nhouse_rules = 'Be brief.'");
        let parts = crate::json::json!([{"type": "text", "text": "Tea?\n\nBe brief."}, {"type": "image_url"}]);
        let mut user = Message::text("user", "");
        user.content = parts;
        let only_rules = [Message::text("system", "Be brief."), Message::text("user", "Be brief.")];
        let stripped = short.strip(&[&only_rules[..], &[user]].concat());
        let texts: Vec<(&str, String)> = stripped.iter().map(|m| (m.role.as_str(), m.plain_text())).collect();
        assert_eq!(texts, [("user", String::new()), ("user", "Tea?".into())]);
    }

    #[test]
    fn a_workload_is_found_by_its_name() {
        let both = Workloads::compile(&[workload("name = 'a'"), workload("name = 'b'\nmatch = 'name'")]).unwrap();
        assert_eq!(both.find(Some("b")).unwrap().0.name, "b");
        assert!(both.find(Some("c")).is_none() && both.find(None).is_none());
    }

    #[test]
    fn parts_of_one_kind_are_numbered() {
        let toml = "name = 'a'\nrules = [{ kind = 'ended' }, { kind = 'regex_must', pattern = 'a' }, { kind = 'regex_must', pattern = 'b' }]";
        let workloads = Workloads::compile(&[workload(toml)]).unwrap();
        let parts: Vec<&str> = workloads.find(Some("a")).unwrap().1.iter().map(|c| c.part.as_str()).collect();
        assert_eq!(parts, ["rules/ended", "rules/regex_must", "rules/regex_must_2"]);
    }

    #[test]
    fn refusals_name_workload_rule_and_value() {
        let toml = "name = 'shop'\nrules = [{ kind = 'ended' }, { kind = 'regex_must', pattern = '[' }]";
        let message = Workloads::compile(&[workload(toml)]).unwrap_err().to_string();
        assert!(message.starts_with("workload \"shop\", rule 1 (regex_must): pattern \"[\""), "{message}");
        let twice = Workloads::compile(&[workload("name = 'a'"), workload("name = 'a'")]).unwrap_err().to_string();
        assert!(twice.contains("\"a\"") && twice.contains("twice"), "{twice}");
        toml::from_str::<Workload>("name = 'a'\nhouse_rule = 'x'").expect_err("unknown keys are refused");
    }
}
