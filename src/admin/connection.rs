//! Connections of the page, each with its limits: how many, how long a head may take and be, how long a connection lives.
//!
//! `axum::serve` has none of them, so that a handful of clients that send a byte a minute would keep everybody out.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

/// What every connection is held to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections at a time; further ones wait in the system's queue.
    pub(super) connections: usize,
    /// Time for the handshake, and for the head of each request.
    pub(super) head: Duration,
    /// Time from a connection's start to its end, whatever it does.
    pub(super) life: Duration,
}

/// The longest head of a request, in bytes, and the most lines in it.
const HEAD_BYTES: usize = 16 << 10;
const HEADERS: usize = 64;
/// Time that connections under way get at the end.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after a failed accept, which is mostly a lack of file descriptors that time mends.
const BREATH: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection, as far as the connection tells.
#[derive(Debug, Clone, Default)]
pub(super) struct Peer {
    /// SHA-256 of the certificate that the client showed and our authority signed.
    pub(super) certificate: Option<String>,
}

/// Answers connections until `shutdown` resolves, then gives those under way a moment to finish.
pub(super) async fn serve(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(limits.connections));
    let (close, closing) = watch::channel(false);
    let mut shutdown = pin!(shutdown);
    let mut open = JoinSet::new();
    loop {
        let place = tokio::select! {
            place = places.clone().acquire_owned() => place.map_err(io::Error::other)?,
            () = &mut shutdown => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = &mut shutdown => break,
        };
        while open.try_join_next().is_some() {}
        let Ok((stream, _)) = accepted else {
            tokio::time::sleep(BREATH).await;
            continue;
        };
        let (tls, router, closing) = (tls.clone(), router.clone(), closing.clone());
        open.spawn(async move {
            let _place = place;
            let talk = converse(stream, tls, router, limits, closing);
            if tokio::time::timeout(limits.life, talk).await.is_err() {
                tracing::debug!("a connection of the page was closed at the end of its time");
            }
        });
    }
    // Without a receiver there is nobody left to tell.
    let _told = close.send(true);
    let drained = tokio::time::timeout(DRAIN, async { while open.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::debug!("connections of the page were cut at the end");
    }
    Ok(())
}

async fn converse(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    closing: watch::Receiver<bool>,
) {
    let Some(tls) = tls else { return talk(stream, Peer::default(), router, limits, closing).await };
    match tokio::time::timeout(limits.head, tls.accept(stream)).await {
        Ok(Ok(stream)) => {
            let shown = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
            let peer = Peer { certificate: shown.map(|der| hex::encode(Sha256::digest(der))) };
            talk(stream, peer, router, limits, closing).await;
        }
        Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake of the page failed"),
        Err(_) => tracing::debug!("a TLS handshake of the page took too long"),
    }
}

async fn talk(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: Peer,
    router: Router,
    limits: Limits,
    mut closing: watch::Receiver<bool>,
) {
    let service = TowerToHyperService::new(router.layer(Extension(peer)));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // A client may say that it has sent everything and still wait for its answer.
        .half_close(true)
        .header_read_timeout(limits.head)
        .max_header_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => Some(ended),
        () = async { drop(closing.wait_for(|closing| *closing).await) } => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection of the page ended early");
    }
}
