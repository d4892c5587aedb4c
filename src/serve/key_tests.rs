use serde_json::json;

use super::tests::Fake;
use super::*;

#[tokio::test]
async fn without_the_key_nothing_but_health_is_answered() {
    let folder = tempfile::tempdir().unwrap();
    let api_key_file = folder.path().join("key");
    std::fs::write(&api_key_file, "s3cret\n").unwrap();
    let fake = Fake::with(Settings { api_key_file, ..Settings::default() }, CallLog::None).await;
    let ask = async |path: &str, key: Option<&str>| {
        let mut request = reqwest::Client::new().get(format!("{}{path}", fake.url));
        if let Some(key) = key {
            request = request.header("authorization", key);
        }
        request.send().await.unwrap().status().as_u16()
    };
    assert_eq!(ask("/health", None).await, 200);
    assert_eq!(ask("/v1/models", Some("Bearer s3cret")).await, 200);
    for wrong in
        [None, Some("Bearer s3cre"), Some("Bearer s3crets"), Some("Basic s3cret"), Some("s3cret"), Some("Bearer ")]
    {
        assert_eq!(ask("/v1/models", wrong).await, 401, "{wrong:?}");
    }
    let body = json!({ "lora_name": "v1", "lora_path": fake.adapter("v1", 8) });
    assert_eq!(fake.call("POST", "/v1/load_lora_adapter", &body).await.0, 401);
    assert_eq!(fake.call("PUT", "/v1/aliases/production", &json!({ "target": "base", "expected": null })).await.0, 401);
}

#[test]
fn an_address_that_others_reach_needs_a_key() {
    let open = "10.0.0.5:8000".parse().unwrap();
    let error = key::read(&Settings::default(), open).unwrap_err().to_string();
    assert!(error.contains("10.0.0.5:8000 can be reached from other machines"), "{error}");
    assert!(key::read(&Settings::default(), "[::1]:8000".parse().unwrap()).unwrap().is_none());
    let folder = tempfile::tempdir().unwrap();
    let api_key_file = folder.path().join("key");
    std::fs::write(&api_key_file, "s3cret").unwrap();
    assert!(key::read(&Settings { api_key_file, ..Settings::default() }, open).unwrap().is_some());
}
