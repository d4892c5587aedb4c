use super::*;

/// One pair with the cosine that PyTorch and transformers give (tools/reference/similarity_golden.py).
#[derive(Deserialize)]
struct Golden {
    question: String,
    answer: String,
    cosine: f64,
}

/// Returns the model's folder where this machine has it. `TAOD_REQUIRE=models` makes its absence a failure.
fn folder() -> Option<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let models = std::env::var("TAOD_MODELS").unwrap_or(format!("{home}/.cache/taod/models"));
    let folder = Path::new(&models).join("all-MiniLM-L6-v2");
    let required = std::env::var("TAOD_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item == "models"));
    if !folder.exists() && !required {
        eprintln!("skipped: {} is not there", folder.display());
        return None;
    }
    Some(folder)
}

fn model(settings: Settings) -> Option<Similarity> {
    Some(Similarity::load(&Settings { model: folder()?, ..settings }).unwrap())
}

fn golden() -> Vec<Golden> {
    serde_json::from_str(include_str!("../../../tests/golden/similarity.json")).unwrap()
}

#[test]
fn cosines_agree_with_the_reference_alone_and_in_a_padded_batch() {
    let Some(model) = model(Settings::default()) else { return };
    let golden = golden();
    let pairs: Vec<_> = golden.iter().map(|g| (g.question.clone(), g.answer.clone())).collect();
    let together = model.cosine(&pairs).unwrap();
    for (at, golden) in golden.iter().enumerate() {
        let alone = model.cosine(&pairs[at..=at]).unwrap()[0];
        for found in [together[at], alone] {
            assert!((found - golden.cosine).abs() < 1e-3, "{}: {found}, reference {}", golden.question, golden.cosine);
        }
    }
}

#[test]
fn questions_are_kept_up_to_the_bound_and_scores_stay_in_range() {
    let Some(model) = model(Settings { cache: 2, batch: 1, ..Settings::default() }) else { return };
    let pair = |question: &str| (question.to_string(), "Rain falls.".to_string());
    let first = model.score(&[pair("Does it rain?"), pair("Does it rain?"), pair("")]).unwrap();
    assert_eq!(first[0], first[1]);
    assert!(first.iter().all(|score| (0.0..=1.0).contains(score)));
    assert_eq!(model.questions.lock().unwrap().len(), 2);
    model.score(&[pair("Why?")]).unwrap();
    assert_eq!(model.questions.lock().unwrap().len(), 1);
    assert_eq!(model.score(&[pair("Does it rain?")]).unwrap()[0], first[0]);
    assert!(model.score(&[]).unwrap().is_empty());
}

#[test]
fn a_folder_without_a_model_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let settings = Settings { model: folder.path().to_path_buf(), ..Settings::default() };
    let message = Similarity::load(&settings).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("rewards.similarity.model"), "{message}");
}

#[test]
fn embeddings_asked_for_by_a_report_leave_the_identity_alone() {
    use crate::rewards::{Rewards, Scorer};
    let Some(folder) = folder() else { return };
    let similarity = Settings { model: folder, ..Settings::default() };
    let rules = crate::rewards::Settings { train: vec![Scorer::Rules], similarity, ..Default::default() };
    let rewards = Rewards::without_base(&rules, &[]).unwrap();
    let before = rewards.identity();
    assert!((rewards.similarity(&[("Tea?".into(), "Tea?".into())]).unwrap()[0] - 1.0).abs() < 1e-6);
    assert_eq!(rewards.identity(), before);
    let trained = crate::rewards::Settings { train: vec![Scorer::Similarity], ..rules };
    assert_ne!(Rewards::without_base(&trained, &[]).unwrap().identity(), before);
}
