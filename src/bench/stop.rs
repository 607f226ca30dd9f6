//! Being asked to end early.

use tokio::sync::watch;

/// Tells whether the measurement is to end, with what has been measured until then.
#[derive(Debug, Clone)]
pub struct Stop(watch::Receiver<bool>);

/// Asks for the end.
#[derive(Debug)]
pub struct Stopper(watch::Sender<bool>);

impl Stop {
    /// Nobody has asked yet; who is given the second can.
    pub fn new() -> (Self, Stopper) {
        let (sender, receiver) = watch::channel(false);
        (Self(receiver), Stopper(sender))
    }

    /// Whether somebody has asked.
    pub fn is_asked(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits until somebody asks; for ever, if nobody can any more.
    pub async fn asked(&mut self) {
        if self.0.wait_for(|asked| *asked).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Stopper {
    /// Asks.
    pub fn ask(&self) {
        self.0.send_replace(true);
    }
}
