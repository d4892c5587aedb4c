//! Where the engine computes, as an operator says it.

use std::fmt;
use std::str::FromStr;

use candle_core::{DType, Device};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::engine::error::EngineError;

/// A name in `engine.device`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum DeviceName {
    /// The processor, with loops of taod's own.
    #[default]
    Cpu,
    /// The processor, with the ops that accelerators use.
    CandleCpu,
    /// A card of NVIDIA's, by its number.
    Cuda(usize),
    /// Apple's.
    Metal,
}

impl FromStr for DeviceName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text.strip_prefix("cuda:").and_then(|number| number.parse().ok());
        match (text, number) {
            ("cpu", _) => Ok(DeviceName::Cpu),
            ("candle-cpu", _) => Ok(DeviceName::CandleCpu),
            ("metal", _) => Ok(DeviceName::Metal),
            ("cuda", _) => Ok(DeviceName::Cuda(0)),
            (_, Some(number)) => Ok(DeviceName::Cuda(number)),
            _ => Err(format!("engine.device is {text:?}; set cpu, cuda, cuda:N (such as cuda:1), metal or candle-cpu")),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceName::Cpu => f.write_str("cpu"),
            DeviceName::CandleCpu => f.write_str("candle-cpu"),
            DeviceName::Cuda(number) => write!(f, "cuda:{number}"),
            DeviceName::Metal => f.write_str("metal"),
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> String {
        name.to_string()
    }
}

/// What frozen weights and the cache are on a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// `bf16` on an accelerator, `f32` elsewhere.
    #[default]
    Auto,
    /// The processor's numbers up to rounding.
    F32,
    /// Half the memory, and what accelerators multiply fastest.
    Bf16,
}

/// Where rounds compute (docs/accelerators.md).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What samples, scores and trains: `cpu`; `cuda`, or `cuda:1` for the second card; `metal`. The program must be built with the
    /// feature of that name. `candle-cpu` is the accelerators' code on the processor: slow, to look into differences with.
    pub device: DeviceName,
    /// What the frozen weights and the cache are on an accelerator. The adapter, the losses and the optimizer are f32 in any case.
    pub dtype: Dtype,
}

impl Settings {
    /// Checks what can be told without the device; the message names key, value and remedy.
    pub fn validate(&self) -> Result<(), String> {
        match (self.device, self.dtype) {
            (DeviceName::Cpu | DeviceName::CandleCpu, Dtype::Bf16) => {
                Err(format!("dtype is bf16, in which {} does not multiply; set it to auto or f32", self.device))
            }
            _ => Ok(()),
        }
    }

    /// Returns true where the engine's own loops compute.
    pub fn is_cpu(&self) -> bool {
        self.device == DeviceName::Cpu
    }

    /// Opens the device, or says what this build or this machine lacks; nothing for the processor.
    pub(crate) fn open(&self) -> Result<Option<Place>, EngineError> {
        self.validate().map_err(|problem| EngineError::request(format!("engine.{problem}")))?;
        let fault = |problem: String, remedy| EngineError::Device { device: self.device.to_string(), problem, remedy };
        let lacks = |feature| {
            let remedy = "build it with that feature (docs/accelerators.md), or set engine.device to cpu";
            Err(fault(format!("this program was built without the cargo feature {feature}"), remedy))
        };
        let (opened, remedy) = match self.device {
            DeviceName::Cpu => return Ok(None),
            DeviceName::CandleCpu => (Ok(Device::Cpu), ""),
            DeviceName::Cuda(_) if !candle_core::utils::cuda_is_available() => return lacks("cuda"),
            DeviceName::Metal if !candle_core::utils::metal_is_available() => return lacks("metal"),
            DeviceName::Cuda(number) => {
                (Device::new_cuda(number), "`nvidia-smi -L` lists the cards and their numbers, from 0")
            }
            DeviceName::Metal => (Device::new_metal(0), "set engine.device to cpu on a machine without Metal"),
        };
        let device = opened.map_err(|e| fault(format!("it cannot be opened: {e}"), remedy))?;
        let dtype = match (self.dtype, self.device) {
            (Dtype::F32, _) | (Dtype::Auto, DeviceName::Cpu | DeviceName::CandleCpu) => DType::F32,
            (Dtype::Bf16, _) | (Dtype::Auto, _) => DType::BF16,
        };
        Ok(Some(Place { name: self.device, device, dtype }))
    }
}

/// A device that is open.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    name: DeviceName,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
}

impl Place {
    /// Returns the processor in 16 bits, which nobody can ask for: what mixes precisions as bf16 does on an accelerator.
    #[cfg(test)]
    pub(crate) fn half() -> Self {
        Place { name: DeviceName::CandleCpu, device: Device::Cpu, dtype: DType::F16 }
    }

    /// Returns true where its numbers are f32 throughout.
    pub(crate) fn is_exact(&self) -> bool {
        self.dtype == DType::F32
    }
}

impl fmt::Display for Place {
    /// As manifests and identities name it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.dtype.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(device: &str, dtype: Dtype) -> Settings {
        Settings { device: device.parse().unwrap(), dtype }
    }

    #[test]
    fn a_device_is_named_as_the_config_names_it() {
        for text in ["cpu", "candle-cpu", "cuda:0", "cuda:3", "metal"] {
            assert_eq!(text.parse::<DeviceName>().unwrap().to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceName::Cuda(0)));
        for text in ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(text.parse::<DeviceName>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_remedy() {
        assert!(settings("cpu", Dtype::Auto).open().unwrap().is_none());
        let place = settings("candle-cpu", Dtype::Auto).open().unwrap().unwrap();
        assert_eq!((place.to_string(), place.is_exact()), ("candle-cpu f32".to_string(), true));
        for device in ["cpu", "candle-cpu"] {
            let error = settings(device, Dtype::Bf16).open().unwrap_err().to_string();
            assert!(error.contains("engine.dtype is bf16") && error.contains(device), "{error}");
        }
    }

    #[test]
    #[cfg(not(any(feature = "cuda", feature = "metal")))]
    fn a_build_without_a_device_names_the_feature() {
        for (device, feature) in [("cuda:1", "feature cuda"), ("metal", "feature metal")] {
            let error = settings(device, Dtype::Auto).open().unwrap_err().to_string();
            assert!(error.contains(&format!("engine.device = \"{device}\"")) && error.contains(feature), "{error}");
        }
    }

    /// A card beyond the last one.
    #[test]
    #[cfg(feature = "cuda")]
    fn a_card_that_is_not_there_is_refused() {
        let error = settings("cuda:99", Dtype::Auto).open().unwrap_err().to_string();
        assert!(error.contains("cuda:99") && error.contains("nvidia-smi -L"), "{error}");
    }
}
