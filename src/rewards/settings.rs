//! What an operator sets about rewards.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::calibration::Calibration;
use super::scorer::Definition;
use super::{anchors, reasoning, similarity};

/// What names every score in `length_corrected`.
pub(super) const ALL: &str = "all";

/// A scorer: what gives an answer one or more scores. It is named by a text, `"rules"` or the name of a definition.
///
/// The base model's log-prob is none of them on purpose: it is the gate's independent guardrail, and a guardrail must be
/// something that the reward cannot contain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Scorer {
    /// The rules of the answer's workload: the hard ones decide whether there is any reward, the graded ones join the mean.
    Rules,
    /// How near the answer's meaning is to the question's (sentence embeddings), a guard against empty form.
    Similarity,
    /// How near an answer is to what users rated, up or down, of the answers to the same prompt. For training alone.
    Feedback,
    /// Shortness, 1 / (1 + words / 20). A reward to be gamed: it exists to prove that the gate's guardrails refuse it.
    Brevity,
    /// One of `[[rewards.scorers]]`, by its name.
    Defined(String),
}

impl Scorer {
    /// Returns the name that the config, the scored parts and error messages use.
    pub fn name(&self) -> &str {
        match self {
            Scorer::Rules => "rules",
            Scorer::Similarity => "similarity",
            Scorer::Feedback => "feedback",
            Scorer::Brevity => "brevity",
            Scorer::Defined(name) => name,
        }
    }

    /// Returns true where the score is what was asked for, exactly, and not a learned or rough measure of it; shortness counts
    /// because it is asked for only to be refused.
    pub fn is_specification(&self) -> bool {
        match self {
            Scorer::Rules | Scorer::Brevity => true,
            Scorer::Similarity | Scorer::Feedback | Scorer::Defined(_) => false,
        }
    }

    /// Returns the version of the scorer's definition; it grows whenever the same input may score differently. That of a
    /// defined scorer is part of its identity.
    pub fn version(&self) -> u32 {
        match self {
            Scorer::Rules | Scorer::Similarity | Scorer::Feedback | Scorer::Brevity | Scorer::Defined(_) => 1,
        }
    }
}

impl From<String> for Scorer {
    fn from(name: String) -> Self {
        match name.as_str() {
            "rules" => Scorer::Rules,
            "similarity" => Scorer::Similarity,
            "feedback" => Scorer::Feedback,
            "brevity" => Scorer::Brevity,
            _ => Scorer::Defined(name),
        }
    }
}

impl From<Scorer> for String {
    fn from(scorer: Scorer) -> Self {
        scorer.name().to_owned()
    }
}

impl JsonSchema for Scorer {
    fn schema_name() -> Cow<'static, str> {
        "Scorer".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        String::json_schema(generator)
    }
}

/// Settings of the rewards stage, `[rewards]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Scorers whose scores make the reward of training: any of "rules", "similarity", "feedback" (nearness to the answers to the
    /// same prompt that users rated; silent where nobody did), "brevity" (shortness, for experiments only), and the names of
    /// `scorers`.
    pub train: Vec<Scorer>,
    /// Scorers whose scores make the gate's score. With "rules" alone and only hard rules it is the strict pass: 1 or 0.
    pub gate: Vec<Scorer>,
    /// How much disagreement between graded scores costs: the reward is mean - lambda * standard deviation. At least 0.
    pub lambda: f64,
    /// File of frozen quantile maps for graded scores; empty = scores count as they are. Another file is another reward,
    /// so open trials become void.
    pub calibration: String,
    /// Scores from which the length bias in `calibration` is taken out, by their names, such as "similarity" or the name of one of
    /// `scorers`; "all" names every one that has a bias there. It is fitted by `taod reward calibrate --length`.
    pub length_corrected: Vec<String>,
    /// Answers that every scorer scores anew each night, so that one which changes is seen.
    pub anchors: anchors::Settings,
    /// Tags around what a reasoning model thinks: trained on, not scored.
    pub reasoning: reasoning::Settings,
    /// The sentence-embedding model behind the scorer "similarity".
    pub similarity: similarity::Settings,
    /// A scorer of your own, such as a reward model. It counts where `train` or `gate` names it and is loaded only then.
    pub scorers: Vec<Definition>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            train: vec![Scorer::Rules, Scorer::Similarity],
            gate: vec![Scorer::Rules],
            lambda: 0.5,
            calibration: String::new(),
            length_corrected: Vec::new(),
            anchors: anchors::Settings::default(),
            reasoning: reasoning::Settings::default(),
            similarity: similarity::Settings::default(),
            scorers: Vec::new(),
        }
    }
}

impl Settings {
    /// Checks ranges; the message names the key, the value and the remedy.
    pub fn validate(&self) -> Result<(), String> {
        for (key, scorers) in [("train", &self.train), ("gate", &self.gate)] {
            if scorers.is_empty() {
                return Err(format!("{key} = []: name at least one scorer, such as \"rules\""));
            }
            let twice = scorers.iter().enumerate().find(|(place, scorer)| scorers[..*place].contains(scorer));
            if let Some((_, scorer)) = twice {
                return Err(format!("{key} names \"{}\" twice: remove one", scorer.name()));
            }
        }
        if self.gate.contains(&Scorer::Feedback) {
            return Err("gate names \"feedback\": fresh gate prompts have no rated answers, and what users rated is what training \
                 learns from; name it in train alone"
                .into());
        }
        if !(self.lambda.is_finite() && self.lambda >= 0.0) {
            return Err(format!("lambda = {}: give a number of at least 0", self.lambda));
        }
        if !self.length_corrected.is_empty() && self.calibration.is_empty() {
            return Err(
                "length_corrected needs a file in calibration: fit one with `taod reward calibrate --length`".into()
            );
        }
        self.anchors.validate().map_err(|message| format!("anchors.{message}"))?;
        self.check_definitions()?;
        self.similarity.validate().map_err(|message| format!("similarity.{message}"))
    }

    fn check_definitions(&self) -> Result<(), String> {
        for (index, definition) in self.scorers.iter().enumerate() {
            definition.validate().map_err(|message| format!("scorers[{index}].{message}"))?;
            if self.scorers[..index].iter().any(|other| other.name == definition.name) {
                return Err(format!("scorers[{index}].name = {:?} is given twice: rename one", definition.name));
            }
        }
        for (key, scorers) in [("train", &self.train), ("gate", &self.gate)] {
            let unknown = |name: &&str| self.scorers.iter().all(|definition| definition.name != **name);
            let defined =
                scorers.iter().filter_map(|s| if let Scorer::Defined(name) = s { Some(name.as_str()) } else { None });
            if let Some(name) = { defined }.find(unknown) {
                return Err(format!(
                    "{key} names \"{name}\": it is none of rules, similarity, feedback, brevity, and no [[rewards.scorers]] has this name"
                ));
            }
        }
        let relative = |scorer: &&Scorer| {
            self.scorers.iter().any(|definition| definition.name == scorer.name() && !definition.kind.is_absolute())
        };
        match self.gate.iter().find(relative) {
            Some(scorer) => Err(format!(
                "gate names \"{}\", a pairwise judge, whose score depends on the other answers: judge pointwise there",
                scorer.name()
            )),
            None => Ok(()),
        }
    }

    /// Says what is wrong where the gate's score holds nothing that training does not optimise. Scorers are told apart by what
    /// they are made from, since one model under two names is one scorer.
    ///
    /// Exact rules are the specification and may stand on both sides, because the guardrail of quality is a scorer of its own.
    /// Anything learned that stands on both sides needs another scorer beside it in the gate.
    pub fn dependent(&self, made_from: &dyn Fn(&str) -> String) -> Option<String> {
        let learned = |scorer: &&Scorer| !scorer.is_specification();
        let optimised: Vec<String> = self.train.iter().filter(learned).map(|scorer| made_from(scorer.name())).collect();
        let is_optimised = |scorer: &&Scorer| optimised.contains(&made_from(scorer.name()));
        let shared = self.gate.iter().filter(learned).find(is_optimised)?;
        let has_other = self.gate.iter().filter(learned).any(|scorer| !is_optimised(&scorer));
        let name = shared.name();
        let train = self.train.iter().filter(learned).find(|scorer| made_from(scorer.name()) == made_from(name));
        let same = match train.map(Scorer::name).filter(|train| *train != name) {
            Some(train) => format!(", the same model as \"{train}\""),
            None => String::new(),
        };
        (!has_other).then(|| {
            format!(
                "gate names \"{name}\"{same}, which rewards.train optimises, and no scorer that it does not: take \"{name}\" out \
                 of one of the two, or add a scorer with other weights to rewards.gate"
            )
        })
    }

    /// Returns what a scorer is made from as far as the config says: the weights' hash or place, the server, the program.
    pub fn made_from(&self, name: &str) -> String {
        self.scorers.iter().find(|definition| definition.name == name).map_or(name.to_owned(), |d| d.kind.made_from())
    }

    /// Says where calibration and config differ about which scores lose what length earns: a map is right for one of the two.
    pub(super) fn check_lengths(&self, calibration: &Calibration) -> Result<(), String> {
        let named = self.length_corrected.iter().filter(|name| *name != ALL);
        if let Some(name) = { named }.find(|name| calibration.length(name).is_none()) {
            return Err(format!(
                "length_corrected names {name:?}, of which the calibration holds no length bias: fit it with `taod reward \
                 calibrate --length`"
            ));
        }
        match calibration.with_length().find(|name| !self.corrects_length(name)) {
            Some(name) => Err(format!(
                "calibration was fitted on {name:?} without what length earns: name it in length_corrected, or fit it again \
                 without --length"
            )),
            None => Ok(()),
        }
    }

    /// Returns true where the length bias of this score is taken out.
    pub fn corrects_length(&self, score: &str) -> bool {
        self.length_corrected.iter().any(|name| name == ALL || name == score)
    }

    /// Returns true where either selection names the scorer.
    pub fn uses(&self, scorer: &Scorer) -> bool {
        self.train.contains(scorer) || self.gate.contains(scorer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(toml: &str) -> String {
        toml::from_str::<Settings>(toml).unwrap().validate().unwrap_err()
    }

    #[test]
    fn defaults_are_valid() {
        Settings::default().validate().unwrap();
        assert_eq!(toml::from_str::<Settings>("").unwrap(), Settings::default());
    }

    #[test]
    fn refusals_name_key_value_and_remedy() {
        assert_eq!(refusal("gate = []"), "gate = []: name at least one scorer, such as \"rules\"");
        assert_eq!(refusal("train = [\"rules\", \"rules\"]"), "train names \"rules\" twice: remove one");
        assert_eq!(refusal("lambda = -1.0"), "lambda = -1: give a number of at least 0");
        assert_eq!(refusal("lambda = nan"), "lambda = NaN: give a number of at least 0");
        assert!(refusal("similarity = { batch = 0 }").starts_with("similarity.batch = 0"));
        assert!(
            refusal("train = [\"quality\"]").contains("\"quality\": it is none of rules"),
            "the guardrail is no scorer"
        );
        toml::from_str::<Settings>("lamda = 1.0").expect_err("unknown keys are refused");
    }

    #[test]
    fn defined_scorers_are_named_once_and_known() {
        let model = "kind = 'classifier', model = 'm'";
        let taken = refusal(&format!("scorers = [{{ name = 'rules', {model} }}]"));
        assert!(taken.starts_with("scorers[0].name = \"rules\" is taken"), "{taken}");
        let twice = refusal(&format!("scorers = [{{ name = 'a', {model} }}, {{ name = 'a', {model} }}]"));
        assert!(twice.starts_with("scorers[1].name = \"a\" is given twice"), "{twice}");
        assert!(refusal("scorers = [{ name = 'A b', kind = 'classifier', model = 'm' }]").contains("lower-case"));
        assert!(
            refusal("scorers = [{ name = 'a', kind = 'classifier', model = '' }]")
                .contains("scorers[0].model is empty")
        );
        let short = refusal("scorers = [{ name = 'a', kind = 'classifier', model = 'm', sha256 = 'ab' }]");
        assert!(short.contains("scorers[0].sha256 = \"ab\""), "{short}");
        let known = format!("gate = ['rules', 'a']\nscorers = [{{ name = 'a', {model} }}]");
        toml::from_str::<Settings>(&known).unwrap().validate().unwrap();
        let pairwise =
            "gate = ['j']\nscorers = [{ name = 'j', kind = 'judge', model = 'm', rubric = 'r', mode = 'pairwise' }]";
        assert!(refusal(pairwise).starts_with("gate names \"j\", a pairwise judge"));
        toml::from_str::<Settings>("scorers = [{ name = 'a', kind = 'oracle' }]")
            .expect_err("unknown kinds are refused");
    }
}
