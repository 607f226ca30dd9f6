//! How long the parts of a call take, for who measures them.
//!
//! Only calls made within [`observed`] are measured. The clock goes with the task, so that what is measured is what everybody
//! else gets: tokens, redirects and retries included.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tower_layer::Layer;
use tower_service::Service;

tokio::task_local! {
    static CALL: Arc<Mutex<State>>;
    /// Nanoseconds that the request's connection took to make; 0 if there was one.
    static CONNECT: Arc<AtomicU64>;
}

/// What a call's time went to. Pauses before retries, and waits for a turn or for another task's token, are in none of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// HTTP requests sent: retries, redirects and the call's own token requests count too.
    pub requests: u64,
    /// Connections made, and the time it took, TLS included.
    pub connections: u64,
    /// Time to connect, all connections together.
    pub connect: Duration,
    /// From sending requests to the first bytes of the answers' bodies, all requests together, without connecting.
    pub first_byte: Duration,
    /// From the first bytes of bodies to their ends.
    pub transfer: Duration,
}

#[derive(Default)]
struct State {
    timing: Timing,
    /// Headers have come, and no byte of a body yet.
    at_headers: bool,
}

/// Makes a call and tells what its time went to.
pub async fn observed<T>(call: impl Future<Output = T>) -> (T, Timing) {
    let state = Arc::<Mutex<State>>::default();
    let output = CALL.scope(Arc::clone(&state), call).await;
    let timing = state.lock().timing;
    (output, timing)
}

/// Sends a request, which is over when the answer's headers are there.
pub(super) async fn sending<T>(send: impl Future<Output = T>) -> T {
    let Ok(call) = CALL.try_with(Arc::clone) else {
        return send.await;
    };
    let (start, connect) = (Instant::now(), Arc::<AtomicU64>::default());
    let output = CONNECT.scope(Arc::clone(&connect), send).await;
    // A connection that is made later than another one became free is not what the request waited for.
    let connect = Duration::from_nanos(connect.load(Ordering::Acquire));
    let mut state = call.lock();
    let State { timing, at_headers } = &mut *state;
    timing.requests += 1;
    timing.connections += u64::from(connect > Duration::ZERO);
    timing.connect += connect;
    timing.first_byte += start.elapsed().saturating_sub(connect);
    *at_headers = true;
    drop(state);
    output
}

/// Receives the next part of a body.
pub(super) async fn receiving<T>(receive: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let output = receive.await;
    // An error means that nobody measures.
    let _ = CALL.try_with(|call| {
        let mut state = call.lock();
        let State { timing, at_headers } = &mut *state;
        let part = if std::mem::take(at_headers) {
            &mut timing.first_byte
        } else {
            &mut timing.transfer
        };
        *part += start.elapsed();
    });
    output
}

/// Notes how long connections take to make, for requests of observed calls.
#[derive(Clone)]
pub(super) struct ConnectLayer;

/// See [`ConnectLayer`].
#[derive(Clone)]
pub(super) struct Connect<S>(S);

impl<S> Layer<S> for ConnectLayer {
    type Service = Connect<S>;

    fn layer(&self, inner: S) -> Connect<S> {
        Connect(inner)
    }
}

impl<S, R> Service<R> for Connect<S>
where
    S: Service<R>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, to: R) -> Self::Future {
        // Taken here, since the rest may go on in another task.
        let noted = CONNECT.try_with(Arc::clone).ok();
        let start = Instant::now();
        let connecting = self.0.call(to);
        Box::pin(async move {
            let connected = connecting.await;
            if let Some(noted) = noted {
                // 584 years fit.
                let took = start.elapsed().as_nanos().max(1) as u64;
                noted.store(took, Ordering::Release);
            }
            connected
        })
    }
}
