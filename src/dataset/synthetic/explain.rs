//! What was made, and what would be, in plain words.

use std::fmt::{self, Display, Formatter};

use super::{Manifest, Need, Settings};

/// A stage's manifest to be read by people.
pub struct Explained<'a>(pub &'a Manifest);

/// Returns what a reason for dropping a text means.
pub(super) fn reason(name: &str) -> &'static str {
    match name {
        "cut" => "its end is missing: longer than dataset.synthetic.max_tokens",
        "empty" => "nothing is asked",
        "near_duplicate" => "nearly the same text as a prompt that is known, of any split",
        "secrets" => "holds a secret or personal data",
        "too_long" => "longer than dataset.max_prompt_chars",
        "not_train" => "its source is no prompt of the training split any more",
        "spare" => "not needed: enough were made before it",
        _ => "of an older or a newer taod",
    }
}

impl Display for Explained<'_> {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Manifest { prompts, settings, .. } = self.0;
        writeln!(out, "\n{prompts:>10} synthetic: made from logged prompts of train; they train, and do nothing else")?;
        for (workload, made) in &self.0.workloads {
            writeln!(
                out,
                "{:>10} {workload}: {} made of {} wanted, beside {} logged (dataset.synthetic.below = {})",
                "", made.made, made.wanted, made.logged, settings.below
            )?;
            for (name, texts) in &made.dropped {
                writeln!(out, "{:>12} {name}: {texts}, {}", "", reason(name))?;
            }
        }
        Ok(())
    }
}

/// Returns what would be made, a line for each workload.
pub fn told(needs: &[Need], settings: &Settings) -> Vec<String> {
    let line = |need: &Need| {
        let Need { workload, logged, wanted } = need;
        format!(
            "workload {workload} has {logged} training prompts, fewer than dataset.synthetic.below ({}): up to {wanted} would be \
             made from them",
            settings.below
        )
    };
    needs.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_of_the_code_is_explained() {
        let mut found = 0;
        for source in [include_str!("admit.rs"), include_str!("asks.rs")] {
            for (at, marker) in ["Some(\"", "drop(\"", "drop(workload, \""].iter().flat_map(|m| source.match_indices(m))
            {
                let name = source[at + marker.len()..].split('"').next().unwrap();
                found += usize::from(reason(name) != reason("?"));
                assert!(
                    reason(name) != reason("?") || !name.chars().all(|c| c.is_ascii_lowercase() || c == '_'),
                    "{name}"
                );
            }
        }
        assert!(found >= 8, "{found}");
    }
}
