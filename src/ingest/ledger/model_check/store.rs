//! One member's way to the shared store, on which a chosen write of a log entry goes wrong or is held.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use deltalake::logstore::object_store::memory::InMemory;
use deltalake::logstore::object_store::path::Path;
use deltalake::logstore::object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use futures::stream::BoxStream;
use tokio::sync::{Notify, Semaphore};

/// What happens to the n-th log entry that a commit writes, counted from 0: that of the dead letters where there are any.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    None,
    /// Nothing is written and the caller hears an error.
    Refuse(u32),
    /// The entry is written and the caller hears an error.
    LandThenFail(u32),
    /// The caller hears that the entry exists although nothing was written.
    FalseConflict(u32),
    /// The caller is stopped before the entry is written.
    HoldBefore(u32),
    /// The caller is stopped after the entry was written, before it hears of it.
    HoldAfter(u32),
}

impl Fault {
    /// Returns every fault of a commit that writes this many log entries.
    pub(super) fn all(entries: u32) -> Vec<Fault> {
        let kinds = [Fault::Refuse, Fault::LandThenFail, Fault::FalseConflict, Fault::HoldBefore, Fault::HoldAfter];
        let faults = (0..entries).flat_map(|n| kinds.map(|kind| kind(n)));
        [Fault::None].into_iter().chain(faults).collect()
    }

    /// Counts a written entry; returns the fault where it is this one's turn.
    fn turn(&mut self) -> Option<Fault> {
        match self {
            Fault::None => None,
            Fault::Refuse(n)
            | Fault::LandThenFail(n)
            | Fault::FalseConflict(n)
            | Fault::HoldBefore(n)
            | Fault::HoldAfter(n)
                if *n > 0 =>
            {
                *n -= 1;
                None
            }
            now => Some(std::mem::replace(now, Fault::None)),
        }
    }
}

#[derive(Debug)]
pub(super) struct Gated {
    store: Arc<InMemory>,
    plan: Mutex<Fault>,
    /// Where the caller is stopped now.
    at: Mutex<Fault>,
    reached: Notify,
    gate: Semaphore,
}

impl Gated {
    pub(super) fn new(store: Arc<InMemory>) -> Self {
        let (plan, at) = (Mutex::new(Fault::None), Mutex::new(Fault::None));
        Gated { store, plan, at, reached: Notify::new(), gate: Semaphore::new(0) }
    }

    /// Sets what happens next.
    pub(super) fn plan(&self, fault: Fault) {
        *self.plan.lock().unwrap() = fault;
    }

    /// Waits until a caller is stopped, and returns where.
    pub(super) async fn held(&self) -> Fault {
        self.reached.notified().await;
        *self.at.lock().unwrap()
    }

    /// Lets the caller that is stopped go on.
    pub(super) fn open(&self) {
        self.gate.add_permits(1);
    }

    async fn stop(&self, at: Fault) {
        *self.at.lock().unwrap() = at;
        self.reached.notify_one();
        self.gate.acquire().await.unwrap().forget();
    }
}

impl std::fmt::Display for Gated {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gated")
    }
}

#[async_trait]
impl ObjectStore for Gated {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let broken = || Error::Generic { store: "gated", source: "connection reset".into() };
        let is_entry = location.as_ref().contains("_delta_log") && location.as_ref().ends_with(".json");
        let fault = if is_entry { self.plan.lock().unwrap().turn() } else { None };
        match fault {
            None | Some(Fault::None) => self.store.put_opts(location, payload, opts).await,
            Some(Fault::Refuse(_)) => Err(broken()),
            Some(Fault::LandThenFail(_)) => self.store.put_opts(location, payload, opts).await.and(Err(broken())),
            Some(Fault::FalseConflict(_)) => {
                Err(Error::AlreadyExists { path: location.to_string(), source: "conditional request conflict".into() })
            }
            Some(hold @ Fault::HoldBefore(_)) => {
                self.stop(hold).await;
                self.store.put_opts(location, payload, opts).await
            }
            Some(hold @ Fault::HoldAfter(_)) => {
                let written = self.store.put_opts(location, payload, opts).await;
                self.stop(hold).await;
                written
            }
        }
    }

    async fn put_multipart_opts(&self, at: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(at, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.store.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.store.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.store.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}
