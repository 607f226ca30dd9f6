//! [`StopSignal`]: a request to end a measurement early.

use tokio::sync::watch;

/// Receives the request to end a measurement with its results so far.
#[derive(Debug, Clone)]
pub struct StopSignal(watch::Receiver<bool>);

/// Sends the request to stop.
#[derive(Debug)]
pub struct StopSender(watch::Sender<bool>);

impl StopSignal {
    /// A new pair of receiver and sender.
    pub fn new() -> (Self, StopSender) {
        let (sender, receiver) = watch::channel(false);
        (Self(receiver), StopSender(sender))
    }

    /// Whether a stop was requested.
    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for the request; for ever if the sender is gone.
    pub async fn requested(&mut self) {
        if self.0.wait_for(|requested| *requested).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl StopSender {
    /// Requests the stop.
    pub fn request(&self) {
        self.0.send_replace(true);
    }
}
