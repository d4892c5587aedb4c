//! Configurations as they were published, in transformers' old and new form.

use serde_json::{Value, json};

use super::super::{LayerKind, ModelConfig, RopeScaling};
use crate::engine::error::EngineError;

/// Returns what is read from a small model of a type with these settings.
fn read(model_type: &str, own: Value) -> Result<ModelConfig, EngineError> {
    let mut value = json!({
        "model_type": model_type, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
    });
    value.as_object_mut().unwrap().extend(own.as_object().unwrap().clone());
    super::read(std::path::Path::new("config.json"), &value)
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.layers.iter().map(|layer| layer.window).collect()
}

#[test]
fn gemma_3_as_published_has_local_and_global_layers_with_their_own_base() {
    let published = json!({
        "hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 256,
        "rope_theta": 1_000_000, "rope_local_base_freq": 10_000, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 512, "sliding_window_pattern": 6, "attn_logit_softcapping": null,
        "final_logit_softcapping": null, "rms_norm_eps": 1e-6,
    });
    let c = read("gemma3_text", published).unwrap();
    let local = LayerKind { rope: Some(1), window: Some(512) };
    let mut expected = vec![local; 8];
    expected[5] = LayerKind { rope: Some(0), window: None };
    assert_eq!(c.layers, expected);
    assert_eq!((c.ropes[0].theta, &c.ropes[0].scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((c.ropes[1].theta, &c.ropes[1].scaling), (1e4, &RopeScaling::None));
    assert_eq!((c.scores.scale, c.scores.cap, c.logit_cap), (1.0 / 16.0, None, None));
    assert!(c.tied && c.embedding_scale == Some(8.0));
}

#[test]
fn gemma_2_slides_every_other_layer_and_caps_unless_told_not_to() {
    let c = read("gemma2", json!({"head_dim": 16, "sliding_window": 64})).unwrap();
    assert_eq!(windows(&c), [Some(64), None].repeat(4));
    assert_eq!((c.scores.cap, c.logit_cap), (Some(50.0), Some(30.0)));
    let off = json!({"head_dim": 16, "attn_logit_softcapping": null, "final_logit_softcapping": null});
    let c = read("gemma2", off).unwrap();
    assert_eq!((c.scores.cap, c.logit_cap), (None, None));
    assert_eq!(windows(&c)[0], Some(4096));
}

#[test]
fn a_window_slides_where_transformers_slides_it() {
    let window = |model_type: &str, own: Value| windows(&read(model_type, own).unwrap());
    assert_eq!(window("mistral", json!({"sliding_window": 512})), [Some(512); 8]);
    assert_eq!(window("mistral", json!({})), [Some(4096); 8]);
    assert_eq!(window("mistral", json!({"sliding_window": null})), [None; 8]);
    // No sequence outgrows it.
    assert_eq!(window("mistral", json!({"sliding_window": 8192})), [None; 8]);
    assert_eq!(window("phi3", json!({"sliding_window": 2047})), [Some(2047); 8]);
    assert_eq!(window("llama", json!({"sliding_window": 512})), [None; 8]);
    let qwen = json!({"use_sliding_window": true, "sliding_window": 512, "max_window_layers": 6});
    assert_eq!(window("qwen2", qwen), [None, None, None, None, None, None, Some(512), Some(512)]);
    assert_eq!(window("qwen3", json!({"use_sliding_window": false, "sliding_window": 512})), [None; 8]);
    let kinds = json!(["sliding_attention", "full_attention"].repeat(4));
    let listed = json!({"use_sliding_window": true, "sliding_window": 512, "layer_types": kinds});
    assert_eq!(window("qwen2", listed), [Some(512), None].repeat(4));
    let error = read("gemma2", json!({"layer_types": ["chunked_attention"]})).unwrap_err().to_string();
    assert!(error.contains("layer_types[0]") && error.contains("chunked_attention"), "{error}");
}

#[test]
fn smollm3_leaves_out_the_rotary_embedding_where_it_is_told_to() {
    let without = |own: Value| {
        let layers = read("smollm3", own).unwrap().layers;
        (0..8).filter(|i| layers[*i].rope.is_none()).collect::<Vec<usize>>()
    };
    assert_eq!(without(json!({})), [3, 7]);
    assert_eq!(without(json!({"no_rope_layer_interval": 3})), [2, 5]);
    assert_eq!(without(json!({"no_rope_layers": [0, 1, 1, 1, 1, 1, 0, 1]})), [0, 6]);
}

#[test]
fn phi_3_keeps_to_the_context_of_its_short_factors() {
    let short: Vec<f64> = (0..6).map(|i| 1.0 + f64::from(i)).collect();
    let rope = |kind: &str| json!({"type": kind, "short_factor": short, "long_factor": short});
    let own = |kind: &str| json!({"rope_scaling": rope(kind), "partial_rotary_factor": 0.75, "original_max_position_embeddings": 1024});
    // Three names of one method.
    for kind in ["longrope", "su", "yarn"] {
        let c = read("phi3", own(kind)).unwrap();
        assert_eq!((c.max_positions, c.ropes[0].dim), (1024, 12));
        let RopeScaling::Divisors { divisors, attention } = &c.ropes[0].scaling else { panic!("{:?}", c.ropes) };
        assert_eq!(divisors[5], 6.0);
        // 8 times the context: sqrt(1 + ln 8 / ln 1024).
        assert!((attention - 1.3f32.sqrt()).abs() < 1e-6);
    }
    let error = read("phi3", json!({"rope_scaling": rope("longrope")})).unwrap_err().to_string();
    assert!(error.contains("short_factor is not a list of 8 numbers"), "{error}");
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let refused = |model_type: &str, own: Value| read(model_type, own).unwrap_err().to_string();
    let error = refused("llama", json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}));
    assert!(error.contains("rope type dynamic is not one of default, linear"), "{error}");
    assert!(refused("llama", json!({"hidden_act": "gelu"})).contains("hidden_act gelu is not silu"));
    let error = refused("gemma2", json!({"hidden_activation": "gelu"}));
    assert!(error.contains("hidden_act gelu is not gelu_pytorch_tanh"), "{error}");
    let both = json!({"use_bidirectional_attention": true});
    assert!(refused("gemma3_text", both).contains("use_bidirectional_attention"));
    assert!(refused("gemma3_text", json!({"attn_logit_softcapping": 50.0})).contains("gemma3_text does not apply"));
    assert!(refused("llama", json!({"partial_rotary_factor": 0.2})).contains("3 rotated dimensions"), "16 * 0.2");
    let error = refused("falcon", json!({}));
    assert!(error.contains("falcon") && error.contains("phi3, gemma2, gemma3_text"), "{error}");
}
