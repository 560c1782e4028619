//! Nova's own view of images, which its clients had before they asked the image service: until 2.35.
//!
//! What is shown and deleted is the image service's.

use axum::{
    Json, Router,
    extract::{Path, State},
    routing::get,
};
use http::StatusCode;
use serde_json::{Map, Value, json};

use super::versions::Version;
use crate::{
    app::App,
    db::rfc3339_s,
    http::{context::Ctx, error::ApiError, query::Params},
    image::{
        index, record,
        record::{Image, Status},
        routes,
    },
};

/// The first microversion without it.
const GONE: u16 = 36;

/// The routes.
pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/images", get(brief))
        .route("/images/detail", get(detail))
        .route("/images/{id}", get(show).delete(delete))
        .route("/images/{id}/metadata", get(metadata))
}

fn there(version: Version) -> Result<(), ApiError> {
    match version.has(GONE) {
        true => Err(ApiError::NotFound("Images are asked of the image service since 2.36.".into())),
        false => Ok(()),
    }
}

/// Nova's word for a state.
fn status(status: Status) -> &'static str {
    match status {
        Status::Active => "ACTIVE",
        Status::Queued | Status::Saving | Status::Uploading | Status::Importing => "SAVING",
        Status::Deactivated => "UNKNOWN",
    }
}

fn links(app: &App, image: &Image) -> Value {
    let base = &app.config.public_url;
    json!([
        {"rel": "self", "href": format!("{base}/compute/v2.1/images/{}", image.id)},
        {"rel": "bookmark", "href": format!("{base}/compute/images/{}", image.id)},
        {"rel": "alternate", "href": format!("{base}/image/v2/images/{}", image.id),
         "type": "application/vnd.openstack.image"},
    ])
}

fn document(app: &App, image: &Image) -> Value {
    let mut document = json!({
        "id": image.id,
        "name": image.name,
        "status": status(image.status),
        "progress": if image.content.is_some() { 100 } else { 0 },
        "created": rfc3339_s(image.created_us),
        "updated": rfc3339_s(image.updated_us),
        "minDisk": image.min_disk_gib,
        "minRam": image.min_ram_mib,
        "metadata": image.properties,
        "links": links(app, image),
        "OS-EXT-IMG-SIZE:size": image.content.as_ref().map(|content| content.size),
    });
    if let Some(server) = image.properties.get("instance_uuid") {
        let base = &app.config.public_url;
        document["server"] = json!({"id": server, "links": [
            {"rel": "self", "href": format!("{base}/compute/v2.1/servers/{server}")},
            {"rel": "bookmark", "href": format!("{base}/compute/servers/{server}")},
        ]});
    }
    document
}

/// A query of Nova's as one of the image service's.
fn translated(params: &Params) -> Result<Params, ApiError> {
    let one = |(name, value): (&str, &str)| {
        let value = match name {
            "status" => match value.to_ascii_uppercase().as_str() {
                "ACTIVE" => "active".to_owned(),
                "SAVING" => "in:queued,saving,uploading,importing".to_owned(),
                _ => "deactivated".to_owned(),
            },
            "changes-since" => format!("gte:{value}"),
            // A link, or the id at its end.
            "server" => value.rsplit('/').next().unwrap_or_default().to_owned(),
            _ => value.to_owned(),
        };
        let name = match name {
            "minDisk" => "min_disk",
            "minRam" => "min_ram",
            "changes-since" => "updated_at",
            "server" => "instance_uuid",
            "type" => "image_type",
            "name" | "status" | "limit" | "marker" => name,
            other => {
                let other: String = other.chars().take(64).collect();
                return Err(ApiError::BadRequest(format!("The parameter {other} chooses no images.")));
            }
        };
        Ok((name.to_owned(), value))
    };
    params.iter().map(one).collect()
}

async fn list(
    app: &App,
    ctx: &Ctx,
    version: Version,
    params: &Params,
    full: bool,
) -> Result<Json<Value>, ApiError> {
    there(version)?;
    let (images, more) = index::page(app, ctx, &translated(params)?, index::MAX_LIMIT).await?;
    let one = |image: &Image| match full {
        true => document(app, image),
        false => json!({"id": image.id, "name": image.name, "links": links(app, image)}),
    };
    let mut body = Map::from_iter([("images".to_owned(), images.iter().map(one).collect())]);
    if let (true, Some(last)) = (more, images.last()) {
        let path = if full { "images/detail" } else { "images" };
        let href = params.link(&format!("{}/compute/v2.1/{path}", app.config.public_url), Some(&last.id));
        body.insert("images_links".to_owned(), json!([{"rel": "next", "href": href}]));
    }
    Ok(Json(Value::Object(body)))
}

async fn brief(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    list(&app, &ctx, version, &params, false).await
}

async fn detail(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    params: Params,
) -> Result<Json<Value>, ApiError> {
    list(&app, &ctx, version, &params, true).await
}

async fn find(app: &App, ctx: &Ctx, version: Version, id: &str) -> Result<Image, ApiError> {
    there(version)?;
    record::find(&mut *app.db.acquire().await?, id, ctx).await
}

async fn show(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let image = find(&app, &ctx, version, &id).await?;
    Ok(Json(json!({"image": document(&app, &image)})))
}

async fn metadata(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({"metadata": find(&app, &ctx, version, &id).await?.properties})))
}

async fn delete(
    State(app): State<App>,
    ctx: Ctx,
    version: Version,
    id: Path<String>,
) -> Result<StatusCode, ApiError> {
    there(version)?;
    routes::delete(State(app), ctx, id).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestApp;

    #[tokio::test]
    async fn images_are_shown_as_nova_did_until_2_35() {
        let test = TestApp::new().await;
        let (_, token) = test.tenant("ada", "member").await;
        let (_, stranger) = test.tenant("eve", "member").await;
        let body = json!({"name": "one", "disk_format": "raw", "container_format": "bare", "color": "blue", "min_ram": 64});
        let made = test.post("/image/v2/images", &token, body).await.expect(201);
        let url = format!("/compute/v2.1/images/{}", made["id"].as_str().unwrap());
        let shown = test.get(&url, &token).await.expect(200)["image"].take();
        assert_eq!((&shown["status"], &shown["minRam"]), (&json!("SAVING"), &json!(64)));
        assert_eq!(shown["metadata"], json!({"color": "blue"}));
        assert_eq!(
            test.get(&format!("{url}/metadata"), &token).await.expect(200)["metadata"],
            shown["metadata"]
        );
        for (path, images) in [
            ("/compute/v2.1/images", 1),
            ("/compute/v2.1/images/detail?name=one&minRam=64&status=saving", 1),
            ("/compute/v2.1/images/detail?status=ACTIVE", 0),
        ] {
            let list = test.get(path, &token).await.expect(200);
            assert_eq!(list["images"].as_array().unwrap().len(), images, "{path}");
        }
        test.get("/compute/v2.1/images?color=blue", &token).await.expect(400);
        test.get_at(&url, &token, 36).await.expect(404);
        test.get(&url, &stranger).await.expect(404);
        test.delete(&url, &stranger).await.expect(404);
        test.delete(&url, &token).await.expect(204);
        test.get(&url, &token).await.expect(404);
    }
}
