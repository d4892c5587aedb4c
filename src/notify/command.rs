//! Running a program of the operator's own: without a shell, with few environment variables, killed when its time is up
//! together with all that it started and that stayed in its group.

use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStderr, ChildStdin, Command as Process};

use super::settings::Command;
use super::{Failure, Notice, NotifyError, said};

/// Bytes of what the program says of its errors that are read.
const MAX_READ: u64 = 4096;
/// How long what was said may take to be read after the program's end.
const GRACE: Duration = Duration::from_millis(200);

pub(super) async fn run(command: &Command, notice: &Notice, limit: Duration) -> Result<(), Failure> {
    let Some((program, arguments)) = command.command.split_first() else { return Ok(()) };
    let start = |source| Failure::last(NotifyError::Start { program: program.clone(), source });
    let mut process = Process::new(program);
    process.args(arguments).process_group(0).kill_on_drop(true).env_clear();
    process.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("LANG", "C.UTF-8");
    process.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut group = Group(process.spawn().map_err(start)?);
    let line = format!("{}\n", serde_json::to_string(notice).unwrap_or_default());
    let ended = tokio::time::timeout(limit, group.tell_and_wait(&line)).await;
    match ended {
        Err(_) => Err(Failure::passing(NotifyError::Slow { program: program.clone(), seconds: limit.as_secs() })),
        Ok(Err(source)) => Err(start(source)),
        Ok(Ok((status, _))) if status.success() => Ok(()),
        Ok(Ok((status, heard))) => {
            Err(Failure::passing(NotifyError::Ended { program: program.clone(), status, said: said(&heard) }))
        }
    }
}

/// A running program and what it started.
struct Group(Child);

impl Group {
    /// Writes the line, waits for the end of the program, and returns the beginning of what it said of its errors.
    async fn tell_and_wait(&mut self, line: &str) -> std::io::Result<(std::process::ExitStatus, Vec<u8>)> {
        let (stdin, stderr) = (self.0.stdin.take(), self.0.stderr.take());
        let mut heard = Vec::new();
        let status = {
            let pipes = async {
                tokio::join!(tell(stdin, line), hear(stderr, &mut heard));
            };
            let mut pipes = std::pin::pin!(pipes);
            let ended = tokio::select! {
                ended = self.0.wait() => Some(ended?),
                () = &mut pipes => None,
            };
            match ended {
                // What the program left running may hold its pipe open for ever; what it said itself is there at once.
                Some(status) => {
                    drop(tokio::time::timeout(GRACE, pipes).await);
                    status
                }
                None => self.0.wait().await?,
            }
        };
        Ok((status, heard))
    }

    /// Kills the group of a program that has not ended.
    #[expect(unsafe_code, reason = "the standard library kills one process, not its group")]
    fn kill(&self) {
        let Some(group) = self.0.id().and_then(|id| libc::pid_t::try_from(id).ok()) else { return };
        // SAFETY: a system call on numbers. `id` is None once the leader was waited for, so the group's id is still its own.
        unsafe { libc::killpg(group, libc::SIGKILL) };
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Writes the line. A program that does not read breaks the pipe, which is no fault of the notice.
async fn tell(stdin: Option<ChildStdin>, line: &str) {
    if let Some(mut stdin) = stdin
        && let Err(error) = stdin.write_all(line.as_bytes()).await
    {
        tracing::debug!(%error, "a program did not read its notice");
    }
}

/// Keeps the beginning of what is said and reads on to the end, so that the program never stalls.
async fn hear(stderr: Option<ChildStderr>, heard: &mut Vec<u8>) {
    let Some(mut stderr) = stderr else { return };
    let kept = (&mut stderr).take(MAX_READ).read_to_end(heard).await;
    let drained = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
    if let (Err(error), _) | (_, Err(error)) = (kept.map(|n| n as u64), drained) {
        tracing::debug!(%error, "what a program says cannot be read");
    }
}
