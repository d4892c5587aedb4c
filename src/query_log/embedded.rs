//! A broker inside this process, for the demo and for tests: librdkafka's mock cluster.
//!
//! It speaks Kafka's protocol over loopback, so everything above reads it as it reads production. It holds at most
//! 5 MiB per partition and forgets the oldest batches beyond that.

use std::sync::mpsc::{Sender, channel};
use std::thread::{self, JoinHandle};

use rdkafka::mocking::MockCluster;

use super::SourceError;

/// A running embedded broker with one topic; dropping it ends it.
pub struct EmbeddedBroker {
    brokers: String,
    // The cluster is a raw handle bound to one thread: that thread owns it and waits for this sender to go.
    stop: Option<Sender<()>>,
    owner: Option<JoinHandle<()>>,
}

impl EmbeddedBroker {
    /// Starts a broker that holds `topic` with that many partitions.
    pub fn start(topic: &str, partitions: i32) -> Result<Self, SourceError> {
        let (stop, stopped) = channel::<()>();
        let (ready, started) = channel();
        let topic = topic.to_owned();
        let owner = thread::Builder::new().name("embedded-broker".into()).spawn(move || {
            let cluster = MockCluster::new(1).and_then(|cluster| {
                cluster.create_topic(&topic, partitions, 1)?;
                Ok(cluster)
            });
            // A failed send means that nobody waits for this broker any more.
            match cluster {
                Ok(cluster) if ready.send(Ok(cluster.bootstrap_servers())).is_ok() => {
                    stopped.recv().ok();
                }
                Ok(_) => {}
                Err(error) => {
                    ready.send(Err(error.to_string())).ok();
                }
            }
        });
        let fail = |cause: String| SourceError::Embedded { cause };
        let owner = owner.map_err(|e| fail(e.to_string()))?;
        let brokers = started.recv().map_err(|e| fail(e.to_string()))?.map_err(fail)?;
        Ok(EmbeddedBroker { brokers, stop: Some(stop), owner: Some(owner) })
    }

    /// Returns what clients connect to.
    pub fn brokers(&self) -> &str {
        &self.brokers
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(owner) = self.owner.take() {
            // The thread ends without panicking; there is nothing to learn from its result.
            owner.join().ok();
        }
    }
}
