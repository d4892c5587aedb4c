//! How many threads the engine computes with.

/// Sets the number of compute threads of this process.
///
/// Call it first in `main`, before any other thread runs. candle counts the machine's physical cores and ignores the
/// quota of a container: on two cores of sixty-four it would run sixty-four threads. The number set is the smaller of
/// `limit` and what this process may use by its quota and its affinity; one that the operator set already is kept.
pub fn init_threads(limit: Option<usize>) {
    let threads = limit.unwrap_or(usize::MAX).min(available()).max(1).to_string();
    for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
        if std::env::var_os(name).is_none() {
            set(name, &threads);
        }
    }
}

/// Returns the cores this process may use. The standard library reads affinity and cgroup quota (versions 1 and 2).
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the number of threads this process computes with.
pub fn used() -> usize {
    rayon::current_num_threads()
}

#[expect(unsafe_code, reason = "candle takes its thread count from the environment alone")]
fn set(name: &str, value: &str) {
    // SAFETY: called first in `main`, while the process has one thread, so nothing reads the environment meanwhile.
    unsafe { std::env::set_var(name, value) }
}
