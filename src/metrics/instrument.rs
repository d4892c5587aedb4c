//! How each kind of metric is registered under its name.

use std::marker::PhantomData;

use prometheus::core::Collector;
use prometheus::{Counter, CounterVec, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge};
use prometheus::{IntGaugeVec, Opts, Registry, Result};

use super::labels::Label;

/// A kind of metric that can be registered by name.
pub trait Instrument: Sized {
    /// Registers the metric and returns the handle that sets it.
    fn declare(registry: &Registry, name: &str, help: &str) -> Result<Self>;
}

/// A kind of metric that can carry one label.
pub trait Labelled: Sized {
    /// Registers a metric with one label and returns one handle for each of its values, in their order.
    fn declare_by(registry: &Registry, name: &str, help: &str, label: &str, values: &[&str]) -> Result<Vec<Self>>;
}

/// Registers a collector and hands it back: prometheus' collectors are handles to shared state.
fn register<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> Result<C> {
    registry.register(Box::new(collector.clone()))?;
    Ok(collector)
}

macro_rules! instruments {
    ($($single:ident, $family:ident;)*) => { $(
        impl Instrument for $single {
            fn declare(registry: &Registry, name: &str, help: &str) -> Result<Self> {
                register(registry, $single::new(name, help)?)
            }
        }

        impl Labelled for $single {
            fn declare_by(registry: &Registry, name: &str, help: &str, label: &str, values: &[&str]) -> Result<Vec<Self>> {
                let family = register(registry, $family::new(Opts::new(name, help), &[label])?)?;
                values.iter().map(|value| family.get_metric_with_label_values(&[value])).collect()
            }
        }
    )* };
}

instruments! {
    IntCounter, IntCounterVec;
    Counter, CounterVec;
    IntGauge, IntGaugeVec;
    Gauge, GaugeVec;
}

impl Instrument for Histogram {
    /// All histograms are of seconds: 5 ms to about 160 s in doublings, from a local commit to a stuck object store.
    fn declare(registry: &Registry, name: &str, help: &str) -> Result<Self> {
        let buckets = prometheus::exponential_buckets(0.005, 2.0, 16)?;
        register(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?)
    }
}

/// A metric with one handle for each value of a label.
#[derive(Debug)]
pub struct By<L, M> {
    /// In the order of `L::ALL`.
    metrics: Vec<M>,
    label: PhantomData<L>,
}

impl<L: Label, M> By<L, M> {
    /// Returns the handle of one label value.
    pub fn get(&self, label: L) -> &M {
        &self.metrics[label.index()]
    }
}

impl<L: Label> By<L, IntGauge> {
    /// Sets one label value to 1 and all others to 0; with `None` all to 0.
    pub fn select(&self, label: Option<L>) {
        for (index, metric) in self.metrics.iter().enumerate() {
            metric.set(i64::from(label.is_some_and(|label| label.index() == index)));
        }
    }
}

impl<L: Label, M: Labelled> Instrument for By<L, M> {
    fn declare(registry: &Registry, name: &str, help: &str) -> Result<Self> {
        let values: Vec<&str> = L::ALL.iter().map(|value| value.as_str()).collect();
        Ok(By { metrics: M::declare_by(registry, name, help, L::NAME, &values)?, label: PhantomData })
    }
}

/// A name that changes over time, shown as the label `version` of the value 1. There is never more than one series.
#[derive(Debug, Clone)]
pub struct Current(IntGaugeVec);

impl Current {
    /// Shows `version`, and no longer the one before.
    pub fn set(&self, version: &str) {
        self.0.reset();
        self.0.with_label_values(&[version]).set(1);
    }
}

impl Instrument for Current {
    fn declare(registry: &Registry, name: &str, help: &str) -> Result<Self> {
        let current = Current(register(registry, IntGaugeVec::new(Opts::new(name, help), &["version"])?)?);
        current.set("none");
        Ok(current)
    }
}
