//! `taod serve`: the embedded endpoint.

use clap::Args;

use super::{Exit, Global, block_on, signals};
use crate::engine::Model;
use crate::serve::{self, log::CallLog};

/// Serve the model over OpenAI's chat interface, with adapters loaded at run time, and log every call to Kafka.
#[derive(Debug, Args)]
pub struct Serve {
    /// A folder in Hugging Face layout, a .gguf file, or a hub id; without it model.path of the config.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Address and port; without it serve.address of the config.
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
}

pub(super) fn run(global: &Global, args: &Serve) -> anyhow::Result<Exit> {
    let config = global.load()?.config;
    let mut settings = config.serve;
    if let Some(address) = &args.listen {
        settings.address = address.clone();
    }
    if settings.trusted_keys.is_empty() {
        settings.trusted_keys = config.registry.trusted_keys;
    }
    let log = CallLog::open(&settings.log_brokers, &settings.log_topic)?;
    let model = Model::load_on(args.model.as_ref().unwrap_or(&config.model.path), config.model.hold, &config.engine)?;
    block_on(async {
        let mut shutdown = signals::shutdown()?;
        let listener = tokio::net::TcpListener::bind(&settings.address)
            .await
            .map_err(|source| serve::ServeError::Listen { address: settings.address.clone(), source })?;
        tracing::info!(address = %listener.local_addr()?, "serving");
        let stop = async move { drop(shutdown.wait_for(|told| *told).await) };
        anyhow::Ok(serve::serve(listener, model, &settings, log, stop).await?)
    })??;
    Ok(Exit::Done)
}
