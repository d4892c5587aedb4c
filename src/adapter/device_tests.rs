//! Training runs on a device: `candle-cpu`, the accelerators' code on the processor.

use super::tests::{expect_golden, samples, settings, tiny};
use super::*;
use crate::engine::train::fixture::Tiny;
use crate::engine::{self, Architecture, DeviceName, Dtype};

fn on_device(tiny: &Tiny) -> Arc<DeviceModel> {
    let engine = engine::Settings { device: DeviceName::CandleCpu, dtype: Dtype::Auto };
    tiny.on(engine.open().unwrap().unwrap())
}

#[test]
fn ten_steps_on_a_device_agree_with_pytorch() {
    for kind in Architecture::ALL {
        let tiny = Tiny::new(kind);
        let device = on_device(&tiny);
        expect_golden(kind.as_str(), Frozen { device: Some(&device), ..tiny.frozen() });
    }
}

#[test]
fn a_run_goes_on_where_it_began_and_an_adapter_anywhere() {
    let (tiny, folder) = (tiny(), tempfile::tempdir().unwrap());
    let device = on_device(&tiny);
    let there = Frozen { device: Some(&device), ..tiny.frozen() };
    let tune = |frozen, start, out: &Path| {
        tune_frozen(frozen, &samples(), start, &settings(), 7, out, &Progress::silent()).map_err(|e| e.to_string())
    };
    let out = folder.path().join("out");
    let outcome = tune(there, None, &out).unwrap();
    assert!(outcome.steps.len() > 2 && outcome.kl_sample > 0.0);
    // The same run on the processor is another run, in either direction.
    let error = tune(tiny.frozen(), None, &out).unwrap_err();
    assert!(error.contains("the device is Some(\"candle-cpu f32\")") && error.contains("engine.device"), "{error}");
    assert_eq!(tune(there, None, &out).unwrap().steps, outcome.steps, "its own is done");
    // What it learnt is an adapter for any of them, and an iteration after it may compute elsewhere.
    tune(tiny.frozen(), Some(&out), &folder.path().join("next")).unwrap();
}
