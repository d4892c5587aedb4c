//! `taod serve` inside this process: the endpoint of the demo and of the simulator.

use anyhow::Result;
use tokio::net::TcpListener;

use crate::config::Config;
use crate::engine::Model;
use crate::round::Paths;
use crate::serve::{self, log::CallLog};

/// The embedded endpoint while it runs.
pub struct Endpoint {
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Result<(), serve::ServeError>>,
}

impl Endpoint {
    /// Starts it on a free port of loopback, logging to the config's topic, and names it in the config.
    pub async fn start(config: &mut Config, model: &Model) -> Result<Endpoint> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        config.endpoint.urls = vec![format!("http://{address}")];
        config.serve.base_model = config.endpoint.base_model.clone();
        config.serve.address = address.to_string();
        config.serve.adapter_root = Paths::new(&config.state.dir).registry();
        config.serve.log_brokers = config.ingest.kafka.brokers.clone();
        config.serve.log_topic = config.ingest.kafka.topic.clone();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async move {
            // An error means that the sender is gone, which is a stop as well.
            let _stopped = stopped.await;
        };
        let (settings, model) = (config.serve.clone(), model.clone());
        let log = CallLog::open(&settings.log_brokers, &settings.log_topic)?;
        let task = tokio::spawn(async move { serve::serve(listener, model, &settings, log, shutdown).await });
        Ok(Endpoint { stop, task })
    }

    /// Stops it and waits until it has.
    pub async fn stop(self) {
        // Both fail only where the server is gone already, which is what is wanted.
        let _gone = self.stop.send(());
        if let Ok(Err(error)) = self.task.await {
            tracing::warn!(%error, "the embedded endpoint did not end in order");
        }
    }
}
