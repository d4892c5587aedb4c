//! Signals as a value that turns true once.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Returns what turns true at the first SIGTERM or SIGINT; a second one ends the process at once. Needs a runtime.
pub(super) fn shutdown() -> std::io::Result<watch::Receiver<bool>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (tell, told) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping; a second signal stops at once");
        tell.send_replace(true);
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        std::process::exit(1);
    });
    Ok(told)
}
