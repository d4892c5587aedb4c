//! Signals as values: one that turns true once, and one that comes whenever the config is to be read again.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

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

/// Returns what comes at each SIGHUP; several before the first was taken count once. Needs a runtime.
pub(super) fn reload() -> std::io::Result<mpsc::Receiver<()>> {
    let mut hang_up = signal(SignalKind::hangup())?;
    let (tell, told) = mpsc::channel(1);
    tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            // A full channel means that a reload is waiting already.
            tell.try_send(()).ok();
        }
    });
    Ok(told)
}
