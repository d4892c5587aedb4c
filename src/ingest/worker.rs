//! The thread that turns records into rows: one, for as long as its session.
//!
//! On tokio's pool each hand-over is done by whichever thread is free. Beside files that are being synced those are dozens in
//! turn, and each keeps for itself, freed and unused, the memory that one hand-over takes: with 50 threads 830 MiB were resident
//! under a budget of 512.

use std::sync::mpsc::{Sender, channel};
use std::thread;

use tokio::sync::oneshot;

use super::IngestError;

type Job = Box<dyn FnOnce() + Send>;

/// A thread that does one job after the other; it ends with the last of its senders.
pub(super) struct Worker {
    jobs: Sender<Job>,
}

impl Worker {
    /// Starts the thread.
    pub(super) fn start() -> Result<Self, IngestError> {
        let (jobs, queue) = channel::<Job>();
        let thread = thread::Builder::new().name("reader".into());
        let started = thread.spawn(move || queue.into_iter().for_each(|job| job()));
        started.map_err(|e| IngestError::Task(e.to_string()))?;
        Ok(Worker { jobs })
    }

    /// Does `work` on the thread. An error means that this or an earlier job panicked.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, IngestError> {
        let gone = || IngestError::Task("the thread that reads records is gone".to_owned());
        let (reply, done) = oneshot::channel();
        let job = move || {
            // Nobody may wait any more: the session ended.
            reply.send(work()).ok();
        };
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        done.await.map_err(|_| gone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn jobs_are_done_on_one_thread_and_a_panic_is_an_error() {
        let worker = Worker::start().unwrap();
        let first = worker.run(|| thread::current().id()).await.unwrap();
        assert_ne!(first, thread::current().id());
        assert_eq!(worker.run(|| thread::current().id()).await.unwrap(), first);
        let error = worker.run(|| panic!("on purpose")).await.unwrap_err();
        assert!(error.to_string().contains("is gone"), "{error}");
        assert!(worker.run(|| ()).await.is_err());
    }
}
