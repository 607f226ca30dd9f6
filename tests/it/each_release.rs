//! [`on_each_release`]: one test per Podman release.

/// Defines a module per scenario, with a test per release. A scenario is `async fn(Release)`.
macro_rules! on_each_release {
    ($($scenario:ident),* $(,)?) => { $(
        mod $scenario {
            use crate::common::Release;

            #[tokio::test(flavor = "multi_thread")]
            async fn podman_4() {
                super::$scenario(Release::Four).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn podman_5() {
                super::$scenario(Release::Five).await;
            }

            #[tokio::test(flavor = "multi_thread")]
            async fn newest_podman() {
                super::$scenario(Release::Newest).await;
            }
        }
    )* };
}
pub(crate) use on_each_release;
