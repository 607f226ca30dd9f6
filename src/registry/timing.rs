//! Measures the parts of a call, for benchmarks.
//!
//! Only calls made within [`measure`] are timed. The clock is task-local, so that it covers the unchanged code path:
//! tokens, redirects and retries included.

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
    static CALL: Arc<Mutex<TimingState>>;
    /// Nanoseconds to establish the request's connection; 0 if one was reused.
    static CONNECT: Arc<AtomicU64>;
}

/// How a call spent its time. Pauses before retries, and waits for a permit or for another task's token, are not
/// included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// HTTP requests sent, with retries, redirects and the call's own token requests.
    pub requests: u64,
    /// Connections established.
    pub connections: u64,
    /// Total time to connect, TLS included.
    pub connect: Duration,
    /// Total time from sending a request to the first bytes of its answer's body, without connecting.
    pub first_byte: Duration,
    /// Total time from the first bytes of a body to its end.
    pub transfer: Duration,
}

#[derive(Default)]
struct TimingState {
    timing: Timing,
    /// Whether headers have arrived, but no byte of the body.
    at_headers: bool,
}

/// Runs `call` and measures how it spends its time.
pub async fn measure<T>(call: impl Future<Output = T>) -> (T, Timing) {
    let state = Arc::<Mutex<TimingState>>::default();
    let output = CALL.scope(Arc::clone(&state), call).await;
    let timing = state.lock().timing;
    (output, timing)
}

/// Times `send`, which ends when the answer's headers have arrived.
pub(super) async fn time_send<T>(send: impl Future<Output = T>) -> T {
    let Ok(call) = CALL.try_with(Arc::clone) else {
        return send.await;
    };
    let (start, connect) = (Instant::now(), Arc::<AtomicU64>::default());
    let output = CONNECT.scope(Arc::clone(&connect), send).await;
    // The request did not wait for a connection that was established after another one became free.
    let connect = Duration::from_nanos(connect.load(Ordering::Acquire));
    let mut state = call.lock();
    let TimingState { timing, at_headers } = &mut *state;
    timing.requests += 1;
    timing.connections += u64::from(connect > Duration::ZERO);
    timing.connect += connect;
    timing.first_byte += start.elapsed().saturating_sub(connect);
    *at_headers = true;
    drop(state);
    output
}

/// Times `receive`, which reads the next bytes of a body.
pub(super) async fn time_receive<T>(receive: impl Future<Output = T>) -> T {
    let start = Instant::now();
    let output = receive.await;
    // An error means that the call is not measured.
    let _ = CALL.try_with(|call| {
        let mut state = call.lock();
        let TimingState { timing, at_headers } = &mut *state;
        let part = if std::mem::take(at_headers) {
            &mut timing.first_byte
        } else {
            &mut timing.transfer
        };
        *part += start.elapsed();
    });
    output
}

/// Times how long connections take to establish, for requests of measured calls.
#[derive(Clone)]
pub(super) struct ConnectLayer;

/// The service of [`ConnectLayer`].
#[derive(Clone)]
pub(super) struct TimedConnect<S>(S);

impl<S> Layer<S> for ConnectLayer {
    type Service = TimedConnect<S>;

    fn layer(&self, inner: S) -> TimedConnect<S> {
        TimedConnect(inner)
    }
}

impl<S, R> Service<R> for TimedConnect<S>
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
        // Read here, since the future may run in another task.
        let elapsed = CONNECT.try_with(Arc::clone).ok();
        let start = Instant::now();
        let connecting = self.0.call(to);
        Box::pin(async move {
            let connected = connecting.await;
            if let Some(elapsed) = elapsed {
                // Does not overflow within 584 years.
                let took = start.elapsed().as_nanos().max(1) as u64;
                elapsed.store(took, Ordering::Release);
            }
            connected
        })
    }
}
