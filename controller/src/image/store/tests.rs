//! Images in a bucket of a server that speaks S3's protocol (moto, installed by `./test`; `MOTE_S3_SERVER` names its program).

use std::{
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

use super::{super::tests::IMAGES, Bucket};
use crate::{
    app::{self, App},
    config::Keys,
    testing::TestApp,
};

/// The server; it ends with this value.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    /// Starts one on a free port, if it is installed.
    fn start() -> Option<Self> {
        let Some(program) = std::env::var_os("MOTE_S3_SERVER") else {
            println!("SKIPPED: MOTE_S3_SERVER doesn't name an S3 server (./test installs moto)");
            return None;
        };
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "SIGKILL"]).arg(program).args(["-H", "127.0.0.1", "-p", "0"]);
        let mut process = command
            .env("PYTHONUNBUFFERED", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let url = lines.find_map(|line| {
            let line = line.ok()?;
            line.split("Running on ").nth(1).map(|url| url.trim().to_owned())
        });
        std::thread::spawn(move || lines.for_each(drop));
        Some(Self { process, url: url.expect("the server says where it runs") })
    }

    fn address(&self, prefix: &str) -> String {
        format!("s3://images/{prefix}?endpoint={}&region=us-east-1", self.url)
    }

    async fn make_bucket(&self) {
        let bucket = Bucket::parse(&self.address(""), Some(keys().0)).unwrap();
        bucket.make().await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn keys() -> Keys {
    Keys(("id".into(), "secret".into()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn images_live_in_a_bucket_and_every_controller_reads_them_there() {
    let Some(server) = tokio::task::block_in_place(Server::start) else { return };
    server.make_bucket().await;
    let address = server.address("my/cloud");
    let test = TestApp::with(|config| config.image_store = Some((address.clone(), Some(keys())))).await;
    let token = test.admin_token.as_str();
    let stores = test.get("/image/v2/info/stores", token).await.expect(200);
    assert_eq!(stores["stores"][0]["id"], "s3");
    let bucket = Bucket::parse(&address, Some(keys().0)).unwrap();
    // One that is sent in parts, the last of which is short.
    let mut large = vec![3_u8; (33 << 20) + 5];
    large[20 << 20] = 4;
    let record = json!({"name": "n", "disk_format": "raw", "container_format": "bare"});
    let mut ids = Vec::new();
    for bytes in [b"small".to_vec(), large.clone()] {
        let id =
            test.post(IMAGES, token, record.clone()).await.expect(201)["id"].as_str().unwrap().to_owned();
        test.send_bytes(token, &id, "file", bytes).await.expect(204);
        ids.push(id);
    }
    assert!(test.app.images.list().unwrap().is_empty(), "nothing stays in the directory");
    assert_eq!(bucket.list().await.unwrap().len(), 2);
    let [small, big] = [0, 1].map(|n| format!("{IMAGES}/{}", ids[n]));
    assert!(test.get(&format!("{big}/file"), token).await.bytes == large);
    let range = http::Request::get(format!("{big}/file"))
        .header("x-auth-token", token)
        .header("range", format!("bytes={}-{}", 20 << 20, (20 << 20) + 1));
    let part = test.send(range.body(axum::body::Body::empty()).unwrap()).await;
    assert_eq!((part.status.as_u16(), part.bytes), (206, vec![4, 3]));
    // Staged bytes are fetched for their import.
    let id = test.post(IMAGES, token, record).await.expect(201)["id"].as_str().unwrap().to_owned();
    test.send_bytes(token, &id, "stage", "staged").await.expect(204);
    let import = json!({"method": {"name": "glance-direct"}, "stores": ["s3"]});
    test.post(&format!("{IMAGES}/{id}/import"), token, import).await.expect(202);
    assert_eq!(test.ended_task(token, &id).await["status"], "success");
    // Bytes that nobody needs go at the next start, the others stay.
    bucket.put_bytes(b"orphan").await;
    assert_eq!(bucket.list().await.unwrap().len(), 4);
    crate::image::blobs::recover(&test.app).await.unwrap();
    assert_eq!(bucket.list().await.unwrap().len(), 3);
    test.delete(&small, token).await.expect(204);
    assert_eq!(bucket.list().await.unwrap().len(), 2);
    // Another cloud can't take the prefix, but this one's other controllers can.
    let mut config = (*test.app.config).clone();
    config.state_dir = test.dir().join("another cloud");
    config.database = None;
    let error = App::open(config).await.err().expect("the bucket belongs to another cloud");
    assert!(format!("{:?}", error).contains("another cloud"), "{error:?}");
    let second = App::open((*test.app.config).clone()).await.unwrap();
    let second = test.beside(second.clone(), app::router(second));
    assert!(second.get(&format!("{big}/file"), token).await.bytes == large);
    drop(server);
    let gone = test.get(&format!("{big}/file"), token).await.expect(503);
    assert_ne!(gone, Value::Null);
}
